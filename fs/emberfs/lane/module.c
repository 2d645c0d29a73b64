/* `emberfs.lane._native`: the lane as Python sees it. See `emberfs/lane/__init__.py`. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "lane.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define LANE_INTERFACE 7 /* of what Python calls here: `lane.native` takes no other one */

static PyObject *lane_lost;

/* ---- checksum */

#define SUM_HELD_BYTES_MAX (64 << 10) /* as FIND_HELD_BYTES_MAX: about 1 us */

static PyObject *crc32c(PyObject *module, PyObject *args) {
    Py_buffer data;
    unsigned int crc = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*|I", &data, &crc)) return NULL;
    PyThreadState *state = data.len > SUM_HELD_BYTES_MAX ? PyEval_SaveThread() : NULL;
    crc = lane_crc32c(crc, data.buf, (size_t)data.len);
    if (state != NULL) PyEval_RestoreThread(state);
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *crc32c_join(PyObject *module, PyObject *args) {
    unsigned int first, second;
    unsigned long long second_bytes;
    (void)module;
    if (!PyArg_ParseTuple(args, "IIK", &first, &second, &second_bytes)) return NULL;
    return PyLong_FromUnsignedLong(lane_crc32c_join(first, second, second_bytes));
}

/* The CRC of everything up to the end of each granule: see `checksum.cumulative_sums`, which says the same in Python. */
static PyObject *cumulative_sums(PyObject *module, PyObject *args) {
    Py_buffer data;
    unsigned long long granule, offset;
    unsigned int crc;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*KKI", &data, &granule, &offset, &crc)) return NULL;
    PyObject *packed = NULL;
    if (granule == 0) {
        PyErr_SetString(PyExc_ValueError, "a granule has bytes");
        goto out;
    }
    uint64_t size = (uint64_t)data.len, step = granule - offset % granule;
    uint64_t count = size == 0 ? 0 : size <= step ? 1 : 1 + (size - step + granule - 1) / granule;
    packed = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * count));
    if (packed == NULL) goto out;
    uint8_t *sums = (uint8_t *)PyBytes_AsString(packed);
    Py_BEGIN_ALLOW_THREADS
    for (uint64_t begin = 0; begin < size; begin += step, step = granule, sums += 4) {
        if (step > size - begin) step = size - begin;
        crc = lane_crc32c(crc, (uint8_t *)data.buf + begin, step);
        for (int byte = 0; byte < 4; byte++) sums[byte] = (uint8_t)(crc >> 8 * byte);
    }
    Py_END_ALLOW_THREADS
out:
    PyBuffer_Release(&data);
    return packed;
}

/* ---- the table, and the server over it */

struct server {
    PyObject_HEAD
    struct lane_table *table;
    struct lane_server *threads; /* NULL once it was stopped */
    int is_stuck;                /* a thread of it goes on, and needs the table */
};

static int server_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"table_bytes_max", "threads", "spin_us", NULL};
    struct server *server = (struct server *)self;
    Py_ssize_t bytes_max;
    int threads, spin_us;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nii", names, &bytes_max, &threads, &spin_us)) return -1;
    if (server->table != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "made once");
        return -1;
    }
    server->table = lane_table_new((size_t)bytes_max);
    if (server->table != NULL && threads == 0) return 0;
    if (server->table != NULL) server->threads = lane_server_new(server->table, threads, spin_us);
    if (server->threads != NULL) return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

static void stop_server(struct server *server) {
    struct lane_server *threads = server->threads;
    int outcome = 0;
    server->threads = NULL;
    if (threads == NULL) return;
    Py_BEGIN_ALLOW_THREADS
    outcome = lane_server_stop(threads);
    Py_END_ALLOW_THREADS
    server->is_stuck = outcome != 0;
}

/* 0, or -1 with an exception: it was made by __new__ alone. */
static int check_server(PyObject *self) {
    if (((struct server *)self)->table != NULL) return 0;
    PyErr_SetString(PyExc_ValueError, "it was not initialised");
    return -1;
}

static void server_dealloc(PyObject *self) {
    struct server *server = (struct server *)self;
    PyTypeObject *type = Py_TYPE(self);
    stop_server(server);
    if (server->table != NULL && !server->is_stuck) lane_table_free(server->table);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static int parse_chunk(const char *chunk, Py_ssize_t size, uint64_t *inode, uint64_t *index) {
    if (size != 16) {
        PyErr_SetString(PyExc_ValueError, "a chunk id is of 16 bytes");
        return -1;
    }
    memcpy(inode, chunk, 8);
    memcpy(index, chunk + 8, 8);
    *inode = __builtin_bswap64(*inode); /* Big-endian in the id: see `types.chunk_id`. */
    *index = __builtin_bswap64(*index);
    return 0;
}

static PyObject *server_put(PyObject *self, PyObject *args) {
    struct server *server = (struct server *)self;
    const char *chunk, *sums;
    Py_ssize_t chunk_size, sums_size;
    unsigned int chain, length, granule_log2;
    int fd;
    long long block;
    uint64_t inode, index;
    if (!PyArg_ParseTuple(args, "Iy#iLIIy#", &chain, &chunk, &chunk_size, &fd, &block, &length, &granule_log2, &sums,
                          &sums_size))
        return NULL;
    if (check_server(self) != 0 || parse_chunk(chunk, chunk_size, &inode, &index) != 0) return NULL;
    if (granule_log2 > 31 || (uint64_t)sums_size / 4 != ((uint64_t)length + (1u << granule_log2) - 1) >> granule_log2) {
        PyErr_SetString(PyExc_ValueError, "one checksum for each granule");
        return NULL;
    }
    uint32_t *aligned = malloc((size_t)sums_size + 4);
    if (aligned == NULL) return PyErr_NoMemory();
    memcpy(aligned, sums, (size_t)sums_size);
    lane_table_put(server->table, chain, inode, index, fd, block, length, granule_log2, aligned,
                   (uint32_t)(sums_size / 4));
    free(aligned);
    Py_RETURN_NONE;
}

static PyObject *server_drop(PyObject *self, PyObject *args) {
    const char *chunk;
    Py_ssize_t size;
    unsigned int chain;
    uint64_t inode, index;
    if (!PyArg_ParseTuple(args, "Iy#", &chain, &chunk, &size) || check_server(self) != 0 ||
        parse_chunk(chunk, size, &inode, &index) != 0)
        return NULL;
    lane_table_drop(((struct server *)self)->table, chain, inode, index);
    Py_RETURN_NONE;
}

static PyObject *server_clear(PyObject *self, PyObject *args) {
    unsigned int chain;
    if (!PyArg_ParseTuple(args, "I", &chain) || check_server(self) != 0) return NULL;
    lane_table_clear(((struct server *)self)->table, chain);
    Py_RETURN_NONE;
}

static PyObject *server_allow(PyObject *self, PyObject *args) {
    unsigned int chain;
    unsigned long long version;
    if (!PyArg_ParseTuple(args, "IK", &chain, &version) || check_server(self) != 0) return NULL;
    lane_table_allow(((struct server *)self)->table, chain, version);
    Py_RETURN_NONE;
}

static PyObject *server_lease(PyObject *self, PyObject *args) {
    long long until_ns;
    if (!PyArg_ParseTuple(args, "L", &until_ns) || check_server(self) != 0) return NULL;
    lane_table_lease(((struct server *)self)->table, until_ns);
    Py_RETURN_NONE;
}

static PyObject *server_adopt(PyObject *self, PyObject *args) {
    struct server *server = (struct server *)self;
    int fd, is_stream;
    const char *tenant = NULL;
    if (!PyArg_ParseTuple(args, "ip|z", &fd, &is_stream, &tenant)) return NULL;
    if (server->threads == NULL) {
        PyErr_SetString(PyExc_ValueError, "it was stopped");
        return NULL;
    }
    if (lane_server_adopt(server->threads, fd, is_stream, tenant) != 0) return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *server_set_keys(PyObject *self, PyObject *args) {
    struct server *server = (struct server *)self;
    struct lane_keys keys = {0};
    const char *packed;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "y#", &packed, &size) || check_server(self) != 0) return NULL;
    if (size % LANE_KEY_BYTES || size > (Py_ssize_t)sizeof keys.keys) {
        PyErr_SetString(PyExc_ValueError, "at most 4 keys of 32 bytes");
        return NULL;
    }
    memcpy(keys.keys, packed, (size_t)size);
    keys.count = (uint32_t)(size / LANE_KEY_BYTES);
    if (server->threads != NULL) lane_server_set_keys(server->threads, &keys);
    Py_RETURN_NONE;
}

static PyObject *server_stats(PyObject *self, PyObject *unused) {
    struct server *server = (struct server *)self;
    struct lane_stats stats = {0};
    (void)unused;
    if (check_server(self) != 0) return NULL;
    if (server->threads != NULL) lane_server_stats(server->threads, &stats);
    return Py_BuildValue("{s:K,s:K,s:K,s:K,s:K,s:K,s:n}", "lanes", stats.lanes, "requests", stats.requests, "items",
                         stats.items, "declined", stats.declined, "damaged", stats.damaged, "bytes", stats.bytes,
                         "extents", (Py_ssize_t)lane_table_count(server->table));
}

static PyObject *server_stop(PyObject *self, PyObject *unused) {
    (void)unused;
    stop_server((struct server *)self);
    Py_RETURN_NONE;
}

static PyObject *server_read(PyObject *self, PyObject *args);

static PyMethodDef server_methods[] = {
    {"put", server_put, METH_VARARGS, "put(chain, chunk, fd, block, length, granule_log2, sums)"},
    {"drop", server_drop, METH_VARARGS, "drop(chain, chunk)"},
    {"clear", server_clear, METH_VARARGS, "clear(chain): its files may be closed afterwards"},
    {"allow", server_allow, METH_VARARGS, "allow(chain, version); version 0: nobody"},
    {"lease", server_lease, METH_VARARGS, "lease(until_ns), by CLOCK_BOOTTIME"},
    {"adopt", server_adopt, METH_VARARGS,
     "adopt(fd, is_stream, tenant=None): serve a lane; the descriptor is the server's from now on. With a tenant it is a\n"
     "reader's, who reads under grants of that one only (\"\": of any)."},
    {"set_keys", server_set_keys, METH_VARARGS, "set_keys(packed): those of grants, 32 bytes each"},
    {"read", server_read, METH_VARARGS,
     "read(items, into, attribute, sums) -> bytes per item as `read_ranges` says, by the caller's own thread; of the packed files\n"
     "all chains are served by the lane of index 0."},
    {"stats", server_stats, METH_NOARGS, "Counters, by name."},
    {"stop", server_stop, METH_NOARGS, "End the threads and the lanes."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot server_slots[] = {
    {Py_tp_init, server_init},
    {Py_tp_dealloc, server_dealloc},
    {Py_tp_methods, server_methods},
    {Py_tp_doc, "Server(table_bytes_max, threads, spin_us): extents, and threads that serve lanes from them, if any."},
    {0, NULL},
};

static PyType_Spec server_spec = {"emberfs.lane._native.Server", sizeof(struct server), 0, Py_TPFLAGS_DEFAULT, server_slots};

/* ---- the client */

/* What a file is to a lane, as `lane.client` packs it: the head, then a slot for each chain of its stripe. */
struct spec_slot {
    uint64_t chain_version;
    uint32_t chain;
    int32_t server; /* index of a lane; -1: none leads to it */
};

struct spec {
    uint64_t inode, length, chunk_size;
    uint64_t slots_count;
    struct spec_slot slots[];
};

/* Memory of this process that servers know, as `lane.client` packs it. */
struct known {
    uint64_t address, size, number;
};

#define SERVERS_MAX 64

struct plan {
    Py_ssize_t items_count;
    int64_t *counts;      /* per item: bytes, or -1: not by a lane */
    uint32_t *sums;       /* the CRC of each item's bytes; NULL: nobody asks for them */
    Py_buffer *buffers;   /* per item that has one */
    uint8_t *has_buffer;
    Py_buffer whole;      /* where all items go one after the other, if they do */
    int has_whole;
    struct lane_piece *pieces;
    size_t pieces_count, pieces_room;
    size_t *ends; /* of the pieces of each step */
    size_t steps_count, steps_room;
    int servers_count;
    struct lane_request servers[SERVERS_MAX]; /* `fd` -1: no lane leads there */
    size_t pieces_of[SERVERS_MAX], room_of[SERVERS_MAX];
    const struct known *known;
    size_t known_count, last_known;
    uint64_t stage_number;
    uint8_t *stage;
    size_t slots_count; /* on the stage: as many steps are under way at most */
    size_t staged_bytes, total_bytes; /* of this step; of all */
    int is_told; /* what servers say of an item's bytes is true of its memory */
    uint32_t grant_place;
    const char *grant;
    Py_ssize_t grant_size;
    uint8_t *shows; /* per server: 1 until the grant was sent there */
};

static void plan_free(struct plan *plan) {
    for (Py_ssize_t at = 0; at < plan->items_count; at++)
        if (plan->has_buffer != NULL && plan->has_buffer[at]) PyBuffer_Release(&plan->buffers[at]);
    if (plan->has_whole) PyBuffer_Release(&plan->whole);
    for (int server = 0; server < plan->servers_count; server++) {
        free(plan->servers[server].head);
        free(plan->servers[server].parts);
        free(plan->servers[server].into);
        free(plan->servers[server].spans);
    }
    free(plan->counts);
    free(plan->buffers);
    free(plan->has_buffer);
    free(plan->pieces);
    free(plan->ends);
}

static const struct known *known_at(struct plan *plan, const uint8_t *address, uint64_t size) {
    uint64_t begin = (uint64_t)(uintptr_t)address;
    for (size_t tried = 0; tried < plan->known_count; tried++) {
        const struct known *known = &plan->known[plan->last_known];
        if (begin >= known->address && begin - known->address < known->size)
            return size <= known->size - (begin - known->address) ? known : NULL;
        if (++plan->last_known == plan->known_count) plan->last_known = 0;
    }
    return NULL;
}

/* Room for one element more in an array of `count`; what it is now, or NULL: there is no memory, and it stays. */
static void *with_room(void *array, size_t count, size_t *room, size_t head, size_t element) {
    if (count < *room) return array;
    size_t more = count ? 2 * count : 64;
    void *grown = realloc(array, head + more * element);
    if (grown != NULL) *room = more;
    return grown;
}

#define STEPS_LOG2 10 /* each has a call of its own, and two that follow each other have more than LANE_STAGE_STEP_BYTES in sum */

_Static_assert(2 * LANE_BYTES_MAX / LANE_STAGE_STEP_BYTES < 1 << STEPS_LOG2, "steps are too small");

#define PHASE_BYTES 4096
#define AHEAD_BYTES 32

/* A copy whose target lies up to 31 bytes ahead of its source, modulo 4,096, takes up to ten times as long (`rep movsb`
   on an AMD EPYC of 2024): each load looks like one of bytes that were just stored. */
static int is_slow_copy(uint64_t from, uint64_t to) { return (to - from) % PHASE_BYTES - 1 < AHEAD_BYTES - 1; }

/* Where bytes are staged, at the earliest from `place` on, that the server copies from `from`, and we copy to `to`. A slot of
   the stage begins with a page, as does a chunk in its file. */
static size_t stage_place(size_t place, uint64_t from, uint64_t to) {
    while (is_slow_copy(from, place) || is_slow_copy(place, to)) place += AHEAD_BYTES;
    return place;
}

/* What is added from now on is of another step. 0, or -1: no memory. */
static int end_step(struct plan *plan) {
    void *ends = with_room(plan->ends, plan->steps_count, &plan->steps_room, 0, sizeof *plan->ends);
    if (ends == NULL) return -1;
    plan->ends = ends;
    plan->ends[plan->steps_count++] = plan->pieces_count;
    plan->staged_bytes = 0;
    return 0;
}

/* Add a range of one chunk, or as much from its beginning as is staged in one piece. 0; 1: no lane for it, or no room; -1: no
   memory. */
static int add_piece(struct plan *plan, uint32_t item, const struct spec *spec, uint64_t index, uint32_t offset,
                     uint32_t *length, uint8_t *into) {
    const struct spec_slot *slot = &spec->slots[index % spec->slots_count];
    if (slot->server < 0 || slot->server >= plan->servers_count || plan->servers[slot->server].fd < 0) return 1;
    struct lane_request *server = &plan->servers[slot->server];
    size_t *count = &plan->pieces_of[slot->server];
    const struct known *known = server->is_stream ? NULL : known_at(plan, into, *length);
    int is_staged = known == NULL && !server->is_stream;
    size_t place = 0;
    if (*count == LANE_ITEMS_MAX || (is_staged && !plan->slots_count)) return 1;
    if (is_staged) {
        uint32_t rest = LANE_STAGE_STEP_BYTES - offset % LANE_STAGE_STEP_BYTES; /* So that no granule is of two pieces. */
        if (*length > rest) *length = rest;
        place = stage_place(plan->staged_bytes, offset, (uintptr_t)into);
        if (place + *length > LANE_STAGE_SLOT_BYTES) {
            if (end_step(plan) != 0) return -1;
            place = stage_place(plan->staged_bytes, offset, (uintptr_t)into);
        }
    }
    void *head = with_room(server->head, *count, &plan->room_of[slot->server], sizeof(struct lane_head), sizeof(struct lane_item));
    if (head == NULL) return -1;
    server->head = head;
    void *pieces = with_room(plan->pieces, plan->pieces_count, &plan->pieces_room, 0, sizeof *plan->pieces);
    if (pieces == NULL) return -1;
    plan->pieces = pieces;
    struct lane_item *items = (struct lane_item *)(server->head + 1);
    items[*count] = (struct lane_item){.inode = spec->inode, .index = index, .chain_version = slot->chain_version,
                                       .chain = slot->chain, .offset = offset, .length = *length,
                                       .grant = plan->grant_place};
    size_t begin = is_staged ? plan->steps_count % plan->slots_count * LANE_STAGE_SLOT_BYTES : 0;
    if (known != NULL) {
        items[*count].region = known->number;
        items[*count].place = (uint64_t)(uintptr_t)into - known->address;
    } else if (is_staged) {
        items[*count].region = plan->stage_number;
        items[*count].place = begin + place;
        plan->staged_bytes = place + *length;
    } else {
        uint64_t rest = spec->length - index * spec->chunk_size;
        items[*count].place = rest < spec->chunk_size ? rest : spec->chunk_size; /* See `lane_stream_spans`. */
    }
    plan->pieces[plan->pieces_count++] = (struct lane_piece){
        .server = slot->server, .item = item, .position = (uint32_t)*count, .into = into,
        .staged = is_staged ? plan->stage + begin + place : NULL};
    plan->total_bytes += *length;
    ++*count;
    return 0;
}

/* Cut an item into ranges of chunks. Its count becomes what there is of it, or -1. 0, or -1: no memory. */
static int add_item(struct plan *plan, uint32_t item, const struct spec *spec, uint64_t offset, uint64_t length, uint8_t *into) {
    if (offset >= spec->length) length = 0;
    else if (length > spec->length - offset) length = spec->length - offset;
    plan->counts[item] = (int64_t)length;
    if (length > LANE_BYTES_MAX - plan->total_bytes) {
        plan->counts[item] = -1; /* Nothing of it is read in vain. */
        return 0;
    }
    for (uint64_t done = 0; done < length;) {
        uint64_t index = (offset + done) / spec->chunk_size, inside = (offset + done) % spec->chunk_size;
        uint32_t step = (uint32_t)(spec->chunk_size - inside < length - done ? spec->chunk_size - inside : length - done);
        int failed = add_piece(plan, item, spec, index, (uint32_t)inside, &step, into + done);
        if (failed < 0) return -1;
        if (failed) {
            plan->counts[item] = -1; /* Pieces that were added before are read in vain. */
            return 0;
        }
        done += step;
    }
    return 0;
}

/* 0; -1 with an exception. An item that is not for a lane is left to whoever can say what is the matter with it. */
static int plan_items(struct plan *plan, PyObject *items, PyObject *into, PyObject *attribute) {
    uint64_t begin = 0;
    PyObject *last_file = NULL, *packed = NULL;
    char *spec_bytes = NULL;
    Py_ssize_t spec_size = 0;
    int failed = 0;
    for (Py_ssize_t at = 0; at < plan->items_count && !failed; at++) {
        PyObject *item = PyList_GetItem(items, at); /* borrowed, as all below */
        plan->counts[at] = -1;
        if (!PyTuple_Check(item) || PyTuple_Size(item) != 3) continue;
        PyObject *file = PyTuple_GetItem(item, 0);
        uint64_t offset = PyLong_AsUnsignedLongLong(PyTuple_GetItem(item, 1));
        uint64_t length = PyLong_AsUnsignedLongLong(PyTuple_GetItem(item, 2));
        if (PyErr_Occurred()) {
            PyErr_Clear();
            continue;
        }
        uint8_t *target = NULL;
        if (plan->has_whole) {
            if (length <= (uint64_t)plan->whole.len && begin <= (uint64_t)plan->whole.len - length)
                target = (uint8_t *)plan->whole.buf + begin;
            begin += length;
        } else if (PyObject_GetBuffer(PyList_GetItem(into, at), &plan->buffers[at], PyBUF_WRITABLE) == 0) {
            plan->has_buffer[at] = 1;
            if (length <= (uint64_t)plan->buffers[at].len) target = plan->buffers[at].buf;
        } else {
            PyErr_Clear();
        }
        if (target == NULL) continue;
        if (file != last_file) {
            Py_CLEAR(packed);
            spec_bytes = NULL;
            last_file = file;
            packed = PyObject_GetAttr(file, attribute);
            if (packed == NULL) PyErr_Clear();
            else if (!PyBytes_Check(packed) || PyBytes_AsStringAndSize(packed, &spec_bytes, &spec_size) != 0) PyErr_Clear();
        }
        const struct spec *spec = (const struct spec *)spec_bytes;
        if (spec == NULL || (size_t)spec_size < sizeof *spec || spec->slots_count == 0 || spec->chunk_size == 0 ||
            (size_t)spec_size != sizeof *spec + spec->slots_count * sizeof *spec->slots)
            continue;
        failed = add_item(plan, (uint32_t)at, spec, offset, length, target);
    }
    Py_CLEAR(packed);
    if (failed) PyErr_NoMemory();
    return failed;
}

static int compare_pieces(const void *first, const void *second) {
    const struct lane_piece *one = *(const struct lane_piece *const *)first, *other = *(const struct lane_piece *const *)second;
    return one->into < other->into ? -1 : one->into > other->into;
}

static uint32_t length_of(const struct plan *plan, const struct lane_piece *piece) {
    const struct lane_head *head = plan->servers[piece->server].head;
    return ((const struct lane_item *)(head + 1))[piece->position].length;
}

/* Some memory is of two items: the first of them does not have what came of it any more. */
static int is_overwritten(const struct plan *plan) {
    const struct lane_piece **sorted = malloc((plan->pieces_count + 1) * sizeof *sorted);
    int found = sorted == NULL;
    for (size_t at = 0; !found && at < plan->pieces_count; at++) sorted[at] = &plan->pieces[at];
    if (!found) qsort(sorted, plan->pieces_count, sizeof *sorted, compare_pieces);
    for (size_t at = 1; !found && at < plan->pieces_count; at++)
        found = sorted[at - 1]->into + length_of(plan, sorted[at - 1]) > sorted[at]->into;
    free(sorted);
    return found;
}

/* 0; -1: no memory. */
static int finish_requests(struct plan *plan, uint64_t call) {
    uint16_t kind = plan->sums == NULL ? LANE_READ : LANE_READ_SUMS;
    if (end_step(plan) != 0) return -1;
    plan->is_told = plan->sums != NULL && (plan->has_whole || !is_overwritten(plan));
    for (int at = 0; at < plan->servers_count; at++) {
        struct lane_request *server = &plan->servers[at];
        size_t count = plan->pieces_of[at];
        if (count == 0) continue;
        *server->head = (struct lane_head){LANE_MAGIC, kind, (uint16_t)count, call};
        if (plan->shows[at] && !server->is_stream) {
            server->grant = plan->grant;
            server->grant_size = (size_t)plan->grant_size;
            plan->shows[at] = 0;
        }
        server->parts = malloc(count * sizeof *server->parts);
        server->into = malloc(count * sizeof *server->into);
        if (server->parts == NULL || server->into == NULL) return -1;
    }
    for (size_t at = 0; at < plan->pieces_count; at++)
        plan->servers[plan->pieces[at].server].into[plan->pieces[at].position] = plan->pieces[at].into;
    return 0;
}

#define COPY_BYTES (128u << 10) /* are in the core's cache still when their CRC is computed */

/* Copy from the stage; the CRC of what is there afterwards, of memory that nothing else is copied to. */
static uint32_t copy_with_sum(uint8_t *into, const uint8_t *staged, size_t size) {
    uint32_t crc = 0;
    for (size_t done = 0, step; done < size; done += step) {
        step = size - done < COPY_BYTES ? size - done : COPY_BYTES;
        memcpy(into + done, staged + done, step);
        crc = lane_crc32c(crc, into + done, step);
    }
    return crc;
}

/* Bring what came to where it belongs. */
static void finish_pieces(void *context, size_t begin, size_t end) {
    struct plan *plan = context;
    for (size_t at = begin; at < end; at++) {
        const struct lane_piece *piece = &plan->pieces[at];
        struct lane_part part = plan->servers[piece->server].parts[piece->position];
        int64_t *count = &plan->counts[piece->item];
        if (part.count < 0 || (uint32_t)part.count != length_of(plan, piece)) *count = -1;
        else if (piece->staged != NULL && !plan->is_told) memcpy(piece->into, piece->staged, (size_t)part.count);
        else if (piece->staged != NULL && copy_with_sum(piece->into, piece->staged, (size_t)part.count) != part.crc)
            *count = -1; /* Damaged on the way through the stage. */
        if (plan->is_told && *count >= 0)
            plan->sums[piece->item] = lane_crc32c_join(plan->sums[piece->item], part.crc, (uint64_t)part.count);
    }
}

/* Some memory is of two items: the CRC of what each has in the end. */
static void sum_again(struct plan *plan) {
    for (size_t at = 0; at < plan->pieces_count; at++) {
        const struct lane_piece *piece = &plan->pieces[at];
        if (plan->counts[piece->item] < 0) continue;
        uint64_t size = length_of(plan, piece);
        uint32_t crc = lane_crc32c(0, piece->into, size);
        plan->sums[piece->item] = lane_crc32c_join(plan->sums[piece->item], crc, size);
    }
}

/* Asked by who waits, without the interpreter's lock. */
static int is_interrupted(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    int has_raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return has_raised;
}

/* Send and wait, without the interpreter. 0, or -1 with an exception; `pending` says on which lanes. */
static int exchange(struct plan *plan, int64_t spin_ns, int64_t timeout_ns, uint8_t *pending) {
    int64_t until_ns = lane_now_ns() + timeout_ns;
    int outcome;
    Py_BEGIN_ALLOW_THREADS
    struct lane_steps steps = {.pieces = plan->pieces, .ends = plan->ends, .count = plan->steps_count,
                               .ahead = plan->slots_count ? plan->slots_count : 1, .finish = finish_pieces, .context = plan};
    outcome = lane_exchange(plan->servers, plan->servers_count, &steps, spin_ns, until_ns);
    if (outcome == 0 && plan->sums != NULL && !plan->is_told) sum_again(plan);
    Py_END_ALLOW_THREADS
    for (int at = 0; at < plan->servers_count; at++) pending[at] = plan->servers[at].pending != 0;
    if (outcome == 0) return 0;
    if (!PyErr_Occurred() && PyErr_CheckSignals() == 0)
        PyErr_SetString(lane_lost, "a lane was lost, or its server did not answer in time");
    return -1;
}

static PyObject *counts_list(const struct plan *plan) {
    PyObject *list = PyList_New(plan->items_count);
    for (Py_ssize_t at = 0; list != NULL && at < plan->items_count; at++) {
        PyObject *count = PyLong_FromLongLong(plan->counts[at]);
        if (count == NULL || PyList_SetItem(list, at, count) != 0) Py_CLEAR(list);
    }
    return list;
}

/* 0, or -1 with an exception. */
static int start_plan(struct plan *plan, PyObject *items, PyObject *into) {
    plan->items_count = PyList_Size(items);
    size_t room = (size_t)plan->items_count + 1;
    plan->counts = malloc(room * sizeof *plan->counts);
    plan->buffers = malloc(room * sizeof *plan->buffers);
    plan->has_buffer = calloc(room, 1);
    if (plan->counts == NULL || plan->buffers == NULL || plan->has_buffer == NULL) {
        plan->items_count = 0;
        PyErr_NoMemory();
        return -1;
    }
    if (!PyList_Check(into)) {
        if (PyObject_GetBuffer(into, &plan->whole, PyBUF_WRITABLE) != 0) return -1;
        plan->has_whole = 1;
    } else if (PyList_Size(into) != plan->items_count) {
        PyErr_SetString(PyExc_ValueError, "one buffer for each item");
        return -1;
    }
    return 0;
}

/* Where the checksums go: words of the machine, one for each item, or nowhere. 0, or -1 with an exception. */
static int take_sums(struct plan *plan, const Py_buffer *sums) {
    if (sums->len == 0) return 0;
    if ((size_t)sums->len != (size_t)plan->items_count * sizeof *plan->sums || (uintptr_t)sums->buf % sizeof *plan->sums) {
        PyErr_SetString(PyExc_ValueError, "a checksum of 4 bytes for each item, aligned");
        return -1;
    }
    plan->sums = sums->buf;
    memset(plan->sums, 0, (size_t)sums->len); /* Of no bytes. */
    return 0;
}

/* The lanes that there are. 0, or -1 with an exception. */
static int take_lanes(struct plan *plan, const Py_buffer *fds, const Py_buffer *streams, const Py_buffer *pending,
                      const Py_buffer *shows) {
    Py_ssize_t count = fds->len / (Py_ssize_t)sizeof(int);
    if (count > SERVERS_MAX || streams->len != count || pending->len != count || shows->len != count ||
        plan->grant_size > (Py_ssize_t)LANE_GRANT_BYTES_MAX) {
        PyErr_SetString(PyExc_ValueError, "a descriptor, and the kind of its lane, for each of at most 64 servers");
        return -1;
    }
    plan->servers_count = (int)count;
    for (int at = 0; at < plan->servers_count; at++) {
        plan->servers[at].fd = ((const int *)fds->buf)[at];
        plan->servers[at].is_stream = ((const uint8_t *)streams->buf)[at];
        ((uint8_t *)pending->buf)[at] = 0;
    }
    return 0;
}

/* Read everything in this thread, from the table. 0, or -1 with an exception. */
static int read_here(struct plan *plan, struct lane_table *table) {
    struct lane_request *all = &plan->servers[0];
    int outcome = finish_requests(plan, 0);
    if (outcome == 0) {
        Py_BEGIN_ALLOW_THREADS
        const struct lane_item *items = (const struct lane_item *)(all->head + 1);
        outcome = lane_read_here(table, items, plan->pieces_count, all->into, plan->sums != NULL, all->parts);
        if (outcome == 0) finish_pieces(plan, 0, plan->pieces_count);
        if (outcome == 0 && plan->sums != NULL && !plan->is_told) sum_again(plan);
        Py_END_ALLOW_THREADS
    }
    if (outcome != 0) PyErr_NoMemory();
    return outcome;
}

static PyObject *server_read(PyObject *self, PyObject *args) {
    PyObject *items, *into, *attribute, *result = NULL;
    uint8_t shows = 0;
    Py_buffer sums;
    if (check_server(self) != 0 || !PyArg_ParseTuple(args, "O!OOw*", &PyList_Type, &items, &into, &attribute, &sums)) return NULL;
    struct plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) {
        PyBuffer_Release(&sums);
        return PyErr_NoMemory();
    }
    /* As if all of it came by one stream: its bytes land where they belong. */
    plan->servers_count = 1;
    plan->servers[0].is_stream = 1;
    plan->shows = &shows;
    if (start_plan(plan, items, into) == 0 && take_sums(plan, &sums) == 0 && plan_items(plan, items, into, attribute) == 0 &&
        (!plan->pieces_count || read_here(plan, ((struct server *)self)->table) == 0))
        result = counts_list(plan);
    plan_free(plan);
    free(plan);
    PyBuffer_Release(&sums);
    return result;
}

static PyObject *read_ranges(PyObject *module, PyObject *args) {
    PyObject *items, *into, *attribute;
    Py_buffer fds, streams, pending, known, shows, sums;
    unsigned long long stage_number, stage_address, call;
    Py_ssize_t stage_bytes;
    long long spin_ns, timeout_ns;
    unsigned int grant_place;
    const char *grant;
    Py_ssize_t grant_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!OOy*y*w*y*KKnKLLIy#w*w*", &PyList_Type, &items, &into, &attribute, &fds, &streams,
                          &pending, &known, &stage_number, &stage_address, &stage_bytes, &call, &spin_ns, &timeout_ns,
                          &grant_place, &grant, &grant_size, &shows, &sums))
        return NULL;
    PyObject *result = NULL;
    struct plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) {
        PyErr_NoMemory();
        goto out;
    }
    plan->known = known.buf;
    plan->known_count = (size_t)known.len / sizeof(struct known);
    plan->stage_number = stage_number;
    plan->stage = (uint8_t *)(uintptr_t)stage_address;
    plan->slots_count = (size_t)stage_bytes / LANE_STAGE_SLOT_BYTES;
    plan->grant_place = grant_place;
    plan->grant = grant;
    plan->grant_size = grant_size;
    plan->shows = shows.buf;
    if (start_plan(plan, items, into) != 0 || take_lanes(plan, &fds, &streams, &pending, &shows) != 0 ||
        take_sums(plan, &sums) != 0 || plan_items(plan, items, into, attribute) != 0)
        goto out;
    if (plan->pieces_count) {
        if (finish_requests(plan, call << STEPS_LOG2) != 0) {
            PyErr_NoMemory();
            goto out;
        }
        if (exchange(plan, spin_ns, timeout_ns, pending.buf) != 0) goto out;
    }
    result = counts_list(plan);
out:
    if (plan != NULL) plan_free(plan);
    free(plan);
    PyBuffer_Release(&fds);
    PyBuffer_Release(&streams);
    PyBuffer_Release(&pending);
    PyBuffer_Release(&known);
    PyBuffer_Release(&shows);
    PyBuffer_Release(&sums);
    return result;
}

/* ---- files */

/* -1 with an exception, unless `lengths` are of ranges that fit into `into`. */
static int check_lengths(const Py_buffer *fds, const Py_buffer *offsets, const Py_buffer *lengths, const Py_buffer *into) {
    Py_ssize_t count = lengths->len / 8, left = into->len;
    int is_right = fds->len == 4 * count && offsets->len == 8 * count && lengths->len == 8 * count;
    for (Py_ssize_t at = 0; is_right && at < count; at++) {
        int64_t length = ((const int64_t *)lengths->buf)[at];
        is_right = length >= 0 && length <= left;
        left -= (Py_ssize_t)length;
    }
    if (is_right) return 0;
    PyErr_SetString(PyExc_ValueError, "as many descriptors as offsets and lengths, of which the buffer has room for all");
    return -1;
}

static PyObject *read_files(PyObject *module, PyObject *args) {
    Py_buffer fds, offsets, lengths, into;
    PyObject *result = NULL;
    size_t count;
    int error;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*w*", &fds, &offsets, &lengths, &into)) return NULL;
    if (check_lengths(&fds, &offsets, &lengths, &into) == 0) {
        Py_BEGIN_ALLOW_THREADS
        count = lane_read_files(fds.buf, offsets.buf, lengths.buf, (size_t)lengths.len / 8, into.buf, &error);
        Py_END_ALLOW_THREADS
        errno = error;
        if (!error) result = PyLong_FromSize_t(count);
        else if (!PyErr_Occurred()) PyErr_SetFromErrno(PyExc_OSError);
    }
    PyBuffer_Release(&fds);
    PyBuffer_Release(&offsets);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&into);
    return result;
}

/* ---- words */

#define FIND_HELD_BYTES_MAX (4 << 20) /* below, to give the interpreter's lock up and wait for it takes longer than to search */

static PyObject *find_word(PyObject *module, PyObject *args) {
    Py_buffer data;
    unsigned int word;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*I", &data, &word)) return NULL;
    PyObject *result = NULL;
    int64_t *places = NULL;
    if (data.len % 4 || (uintptr_t)data.buf % 4) {
        PyErr_SetString(PyExc_ValueError, "words are of 4 bytes, and aligned");
        goto out;
    }
    size_t count = (size_t)data.len / 4, room = 0, found = count / 256;
    while (found > room || places == NULL) {
        free(places);
        room = found + 1;
        places = malloc(room * sizeof *places);
        if (places == NULL) {
            PyErr_NoMemory();
            goto out;
        }
        PyThreadState *state = data.len > FIND_HELD_BYTES_MAX ? PyEval_SaveThread() : NULL;
        found = lane_find_word(data.buf, count, word, places, room);
        if (state != NULL) PyEval_RestoreThread(state);
    }
    result = PyBytes_FromStringAndSize((char *)places, (Py_ssize_t)(found * sizeof *places));
out:
    free(places);
    PyBuffer_Release(&data);
    return result;
}

static PyMethodDef functions[] = {
    {"find_word", find_word, METH_VARARGS, "find_word(words, word) -> where it stands, counted in words, packed as int64"},
    {"read_files", read_files, METH_VARARGS,
     "read_files(descriptors, offsets, lengths, into) -> how many ranges were filled, one after the other; the next one is\n"
     "longer than its file. Packed as int32, int64 and int64. Raises OSError."},
    {"crc32c", crc32c, METH_VARARGS, "crc32c(data, crc=0): see `checksum`."},
    {"crc32c_join", crc32c_join, METH_VARARGS, "crc32c_join(first, second, second_bytes): of two pieces together."},
    {"cumulative_sums", cumulative_sums, METH_VARARGS, "cumulative_sums(data, granule, offset, start) -> packed sums"},
    {"read_ranges", read_ranges, METH_VARARGS,
     "read_ranges(items, into, attribute, fds, streams, pending, known, stage_number, stage_address, stage_bytes, call,\n"
     "spin_ns, timeout_ns, grant_place, grant, shows, sums) -> bytes per item, -1 where no lane could serve it. A reader's\n"
     "grant goes to servers whose `shows` is 1, which is 0 then. `sums` gets a CRC32C per item that was served, of 4 bytes,\n"
     "unless it is empty. If it raises, `pending` says which lanes\n"
     "were asked and did not answer: LaneLost, or what the handler of a signal raised. What is wrong with the arguments\n"
     "is raised before anything is sent."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL) return NULL;
    PyObject *server = PyType_FromSpec(&server_spec);
    lane_lost = PyErr_NewException("emberfs.lane._native.LaneLost", PyExc_ConnectionError, NULL);
    lane_is_interrupted = is_interrupted;
    if (server == NULL || lane_lost == NULL || PyModule_AddIntConstant(module, "INTERFACE", LANE_INTERFACE) != 0 ||
        PyModule_AddIntConstant(module, "STAGE_SLOT_BYTES", LANE_STAGE_SLOT_BYTES) != 0 ||
        PyModule_AddIntConstant(module, "CRC32C_WAY", lane_crc32c_way()) != 0 || PyModule_AddObjectRef(module, "Server", server) != 0 ||
        PyModule_AddObjectRef(module, "LaneLost", lane_lost) != 0)
        Py_CLEAR(module);
    Py_XDECREF(server);
    return module;
}
