// The mixtures of a hyper-connection from their logits, token by token: what `model/hyper.py` does in some 130 operations
// on matrices of 4 x 4, where calling costs a hundred times what computing does. Same steps in the same order, in fp32.

#include "products.h"

#define STREAMS_MAX 16

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static void columns(float *m, int streams, float eps)
{
    for (int k = 0; k < streams; k++) {
        float sum = 0.0f;
        for (int j = 0; j < streams; j++)
            sum += m[j * streams + k];
        sum += eps;
        for (int j = 0; j < streams; j++)
            m[j * streams + k] /= sum;
    }
}

static void rows(float *m, int streams, float eps)
{
    for (int j = 0; j < streams; j++) {
        float sum = 0.0f;
        for (int k = 0; k < streams; k++)
            sum += m[j * streams + k];
        sum += eps;
        for (int k = 0; k < streams; k++)
            m[j * streams + k] /= sum;
    }
}

static void softmax_rows(float *m, int streams, float eps)
{
    for (int j = 0; j < streams; j++) {
        float *row = m + j * streams, most = row[0], sum = 0.0f;
        for (int k = 1; k < streams; k++)
            most = fmaxf(most, row[k]);
        for (int k = 0; k < streams; k++)
            sum += row[k] = expf(row[k] - most);
        for (int k = 0; k < streams; k++)
            row[k] = row[k] / sum + eps;
    }
}

static void mix(const float *in, const float *scale, const float *base, int streams, int iterations, float eps, float *pre,
                float *post, float *comb)
{
    const int square = streams * streams;
    for (int i = 0; i < streams; i++) {
        pre[i] = sigmoid(in[i] * scale[0] + base[i]) + eps;
        post[i] = 2.0f * sigmoid(in[streams + i] * scale[1] + base[streams + i]);
    }
    for (int i = 0; i < square; i++)
        comb[i] = in[2 * streams + i] * scale[2] + base[2 * streams + i];
    softmax_rows(comb, streams, eps);
    columns(comb, streams, eps);
    for (int n = 1; n < iterations; n++) {
        rows(comb, streams, eps);
        columns(comb, streams, eps);
    }
}

// logits [tokens, (2 + streams) * streams]: pre, post, comb; scale [3]; base like a token's logits.
// Gives pre and post [tokens, streams] and comb [tokens, streams, streams]. Returns 1 for too many streams, else 0.
PUBLIC int emberline_hyper_mix(const float *logits, const float *scale, const float *base, long tokens, int streams,
                               int iterations, float eps, float *pre, float *post, float *comb)
{
    if (streams > STREAMS_MAX)
        return 1;
    const long square = streams * streams;
    for (long t = 0; t < tokens; t++)
        mix(logits + t * (2 * streams + square), scale, base, streams, iterations, eps, pre + t * streams, post + t * streams,
            comb + t * square);
    return 0;
}

struct beginning {
    const void *x; // [tokens, streams, width]
    const float *fn, *scale, *base;
    void *y; // [tokens, width]
    float *post, *comb;
    long tokens, streams, width;
    int iterations;
    float eps, rms_eps;
};

INLINE void begin_part(const struct beginning *b, int part, int parts, int type)
{
    long S = b->streams, numbers = S * b->width, outs = (2 + S) * S, begin, end;
    float *x = scratch((size_t)(numbers + outs + S)), *logits = x + numbers, *pre = logits + outs;
    share(b->tokens, 1, part, parts, &begin, &end);
    for (long t = begin; t < end; t++) {
        vec squares = {0};
        for (long i = 0; i < numbers; i += LANES) {
            vec v = load(b->x, t * numbers + i, type);
            squares += v * v;
            store(x, i, v, FP32);
        }
        float factor = 1.0f / sqrtf(sum(squares) / (float)numbers + b->rms_eps);
        outputs(x, 1, b->fn, numbers, outs, logits, outs, FP32, FP32);
        for (long i = 0; i < outs; i++)
            logits[i] *= factor;
        mix(logits, b->scale, b->base, (int)S, b->iterations, b->eps, pre, b->post + t * S, b->comb + t * S * S);
        for (long i = 0; i < b->width; i += LANES) {
            vec total = {0};
            for (long k = 0; k < S; k++)
                total += load(x, k * b->width + i, FP32) * pre[k];
            store(b->y, t * b->width + i, total, type);
        }
    }
}

static void begin_bf16(void *b, int part, int parts) { begin_part(b, part, parts, BF16); }
static void begin_fp32(void *b, int part, int parts) { begin_part(b, part, parts, FP32); }

// A block's input of a few tokens, and what mixes its output in: y [tokens, width], post, comb. width is a multiple of 32.
PUBLIC int emberline_hyper_begin(const void *x, const float *fn, const float *scale, const float *base, void *y, float *post,
                                 float *comb, long tokens, long streams, long width, int iterations, float eps, float rms_eps,
                                 int type, int threads)
{
    if (streams > STREAMS_MAX)
        return 1;
    struct beginning b = {x, fn, scale, base, y, post, comb, tokens, streams, width, iterations, eps, rms_eps};
    in_parts(type == BF16 ? begin_bf16 : begin_fp32, &b, tokens * streams * width * (2 + streams) * streams, threads);
    return 0;
}
