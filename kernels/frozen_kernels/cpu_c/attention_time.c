// Divided attention over time in one pass over the packed qkv, forward and backward; see cls.h for the layout and for
// the CLS row. Macros: KIND, WIDTH, and FRAMES, which is sizes' frames. A task is one of `chunks` ranges of positions of
// one clip.

#include "cls.h"

// Probabilities of the queries of one position over CLS (key[0]) and its FRAMES tokens.
static inline void softmax(float (*query)[WIDTH], float (*key)[WIDTH], float scale, float (*p)[FRAMES + 1]) {
    for (int t = 0; t < FRAMES; t++) {
        float maximum = -INFINITY, total = 0;
        for (int u = 0; u <= FRAMES; u++) {
            p[t][u] = scale * dot(query[t], key[u]);
            maximum = p[t][u] > maximum ? p[t][u] : maximum;
        }
        for (int u = 0; u <= FRAMES; u++) p[t][u] = exp_negative(p[t][u] - maximum);
        for (int u = 0; u <= FRAMES; u++) total += p[t][u];
        for (int u = 0; u <= FRAMES; u++) p[t][u] /= total;
    }
}

// Patch rows of out, and running [B, chunks, N, RUNNING] of the CLS row; tasks: B * chunks.
void time_forward(long tasks, int threads, sizes z, const void *qkv, void *out, float *running) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long clip = task / z.chunks, chunk = task % z.chunks;
        long first = z.positions * chunk / z.chunks, last = z.positions * (chunk + 1) / z.chunks;
        float *own = running + task * z.heads * RUNNING;
        start(own, z.heads);
        float cls[z.heads][4][WIDTH];
        load_cls(&z, qkv, NULL, clip, cls);
        for (long position = first; position < last; position++) {
            for (long n = 0; n < z.heads; n++) {
                float query[FRAMES][WIDTH], key[FRAMES + 1][WIDTH], value[FRAMES + 1][WIDTH];
                float p[FRAMES][FRAMES + 1], cls_scores[FRAMES], row[WIDTH];
                memcpy(key[0], cls[n][1], sizeof key[0]);
                memcpy(value[0], cls[n][2], sizeof value[0]);
                for (int t = 0; t < FRAMES; t++) {
                    long token = 1 + t * z.positions + position;
                    load(KIND, qkv, at_qkv(&z, clip, token, 0, n), query[t], WIDTH);
                    load(KIND, qkv, at_qkv(&z, clip, token, 1, n), key[t + 1], WIDTH);
                    load(KIND, qkv, at_qkv(&z, clip, token, 2, n), value[t + 1], WIDTH);
                    cls_scores[t] = z.scale * dot(cls[n][0], key[t + 1]);
                }
                softmax(query, key, z.scale, p);
                for (int t = 0; t < FRAMES; t++) {
                    for (int d = 0; d < WIDTH; d++) row[d] = p[t][0] * value[0][d];
                    for (int u = 1; u <= FRAMES; u++) add(row, p[t][u], value[u]);
                    store(KIND, out, at_out(&z, clip, 1 + t * z.positions + position, n), row, WIDTH);
                }
                extend(own + n * RUNNING, cls_scores, value + 1, FRAMES);
            }
        }
    }
}

// Gradients of the patches' q, k and v, and each task's share of those of CLS, sums [B, chunks, N, 3, WIDTH].
void time_backward(long tasks, int threads, sizes z, const void *qkv, const void *grad_out, const float *state,
                   void *grad_qkv, float *sums) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long clip = task / z.chunks, chunk = task % z.chunks;
        long first = z.positions * chunk / z.chunks, last = z.positions * (chunk + 1) / z.chunks;
        float cls[z.heads][4][WIDTH];
        load_cls(&z, qkv, grad_out, clip, cls);
        memset(sums + task * z.heads * 3 * WIDTH, 0, z.heads * 3 * WIDTH * sizeof(float));
        for (long position = first; position < last; position++) {
            for (long n = 0; n < z.heads; n++) {
                float query[FRAMES][WIDTH], grad[FRAMES][WIDTH];
                float key[FRAMES + 1][WIDTH], value[FRAMES + 1][WIDTH], p[FRAMES][FRAMES + 1], row[WIDTH];
                const float *own = state + (clip * z.heads + n) * STATE;
                float (*cls_sums)[WIDTH] = (float (*)[WIDTH])(sums + (task * z.heads + n) * 3 * WIDTH);
                memcpy(key[0], cls[n][1], sizeof key[0]);
                memcpy(value[0], cls[n][2], sizeof value[0]);
                for (int t = 0; t < FRAMES; t++) {
                    long token = 1 + t * z.positions + position;
                    load(KIND, qkv, at_qkv(&z, clip, token, 0, n), query[t], WIDTH);
                    load(KIND, qkv, at_qkv(&z, clip, token, 1, n), key[t + 1], WIDTH);
                    load(KIND, qkv, at_qkv(&z, clip, token, 2, n), value[t + 1], WIDTH);
                    load(KIND, grad_out, at_out(&z, clip, token, n), grad[t], WIDTH);
                }
                float ds[FRAMES][FRAMES + 1];  // gradients of the scores, times scale
                softmax(query, key, z.scale, p);
                for (int t = 0; t < FRAMES; t++) {
                    float delta = 0;
                    for (int u = 0; u <= FRAMES; u++) ds[t][u] = dot(grad[t], value[u]);
                    for (int u = 0; u <= FRAMES; u++) delta += p[t][u] * ds[t][u];
                    for (int u = 0; u <= FRAMES; u++) ds[t][u] = z.scale * p[t][u] * (ds[t][u] - delta);
                    for (int d = 0; d < WIDTH; d++) row[d] = ds[t][0] * key[0][d];
                    for (int u = 1; u <= FRAMES; u++) add(row, ds[t][u], key[u]);
                    store(KIND, grad_qkv, at_qkv(&z, clip, 1 + t * z.positions + position, 0, n), row, WIDTH);
                    add(cls_sums[1], ds[t][0], query[t]);
                    add(cls_sums[2], p[t][0], grad[t]);
                }
                for (int u = 1; u <= FRAMES; u++) {
                    long token = 1 + (u - 1) * z.positions + position;
                    float grad_key[WIDTH], grad_value[WIDTH];
                    cls_share(&z, own, cls[n], key[u], value[u], cls_sums, grad_key, grad_value);
                    for (int t = 0; t < FRAMES; t++) add(grad_key, ds[t][u], query[t]);
                    for (int t = 0; t < FRAMES; t++) add(grad_value, p[t][u], grad[t]);
                    store(KIND, grad_qkv, at_qkv(&z, clip, token, 1, n), grad_key, WIDTH);
                    store(KIND, grad_qkv, at_qkv(&z, clip, token, 2, n), grad_value, WIDTH);
                }
            }
        }
    }
}
