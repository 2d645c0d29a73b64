// The mixtures of a hyper-connection from their logits, token by token: what `model/hyper.py` does in some 130 operations
// on matrices of 4 x 4, where calling costs a hundred times what computing does. Same steps in the same order, in fp32.

#include <math.h>

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

// logits [tokens, (2 + streams) * streams]: pre, post, comb; scale [3]; base like a token's logits.
// Gives pre and post [tokens, streams] and comb [tokens, streams, streams]. Returns 1 for too many streams, else 0.
__attribute__((visibility("default")))
int emberline_hyper_mix(const float *logits, const float *scale, const float *base, long tokens, int streams,
                        int iterations, float eps, float *pre, float *post, float *comb)
{
    if (streams > STREAMS_MAX)
        return 1;
    const int square = streams * streams;
    for (long t = 0; t < tokens; t++) {
        const float *in = logits + t * (2 * streams + square);
        float *m = comb + t * square;
        for (int i = 0; i < streams; i++) {
            pre[t * streams + i] = sigmoid(in[i] * scale[0] + base[i]) + eps;
            post[t * streams + i] = 2.0f * sigmoid(in[streams + i] * scale[1] + base[streams + i]);
        }
        for (int i = 0; i < square; i++)
            m[i] = in[2 * streams + i] * scale[2] + base[2 * streams + i];
        softmax_rows(m, streams, eps);
        columns(m, streams, eps);
        for (int n = 1; n < iterations; n++) {
            rows(m, streams, eps);
            columns(m, streams, eps);
        }
    }
    return 0;
}
