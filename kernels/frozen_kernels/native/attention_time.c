// Divided attention over time, CLS row included, in one pass over the packed qkv, forward and backward.
// Macros: KIND of the elements, FRAMES, WIDTH of a head. Layout: qkv [B, S, 3, N, D], out and its gradient [B, S, N, D],
// S = 1 + FRAMES * positions, CLS first, then frame by frame. Everything is computed in float.
//
// A task is one of `chunks` ranges of positions of one clip. What concerns CLS is gathered per task and added up in the
// order of the tasks by the *_cls functions, so the result does not depend on the number of threads.

#include "common.h"

typedef struct {
    long positions, heads, chunks;
    float scale;
} sizes;

enum { STATE = WIDTH + 1, RUNNING = WIDTH + 2 };  // out and log-sum-exp of CLS; sum of values, maximum, sum of weights

static inline float dot(const float *a, const float *b) {
    float sum = 0;
    for (int d = 0; d < WIDTH; d++) sum += a[d] * b[d];
    return sum;
}

// to += factor * from
static inline void add(float *to, float factor, const float *from) {
    for (int d = 0; d < WIDTH; d++) to[d] += factor * from[d];
}

// Index of part (0 q, 1 k, 2 v) of a token and head in qkv, and of a token and head in out.
static inline size_t at_qkv(const sizes *z, long clip, long token, int part, long head) {
    return (size_t)(((clip * (1 + FRAMES * z->positions) + token) * 3 + part) * z->heads + head) * WIDTH;
}

static inline size_t at_out(const sizes *z, long clip, long token, long head) {
    return (size_t)((clip * (1 + FRAMES * z->positions) + token) * z->heads + head) * WIDTH;
}

// The rows of CLS in float, per head: q, k, v and, where grad_out is given, the gradient of out.
static inline void load_cls(const sizes *z, const void *qkv, const void *grad_out, long clip, float (*rows)[4][WIDTH]) {
    for (long n = 0; n < z->heads; n++) {
        for (int part = 0; part < 3; part++) load(KIND, qkv, at_qkv(z, clip, 0, part, n), rows[n][part], WIDTH);
        if (grad_out) load(KIND, grad_out, at_out(z, clip, 0, n), rows[n][3], WIDTH);
    }
}

// Adds weights e^(score - maximum) and their values to a running softmax: value sums [WIDTH], maximum, weight sum.
static inline void extend(float *running, const float *scores, float (*value)[WIDTH], int count) {
    float maximum = running[WIDTH];
    for (int t = 0; t < count; t++) maximum = scores[t] > maximum ? scores[t] : maximum;
    if (maximum > running[WIDTH]) {
        float shrink = exp_negative(running[WIDTH] - maximum);
        for (int d = 0; d < WIDTH; d++) running[d] *= shrink;
        running[WIDTH + 1] *= shrink;
        running[WIDTH] = maximum;
    }
    for (int t = 0; t < count; t++) {
        float weight = exp_negative(scores[t] - maximum);
        running[WIDTH + 1] += weight;
        add(running, weight, value[t]);
    }
}

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

// Patch rows of out, and running [B, chunks, N, RUNNING] of the CLS row; tasks begin .. end of B * chunks.
void time_forward(long begin, long end, sizes z, const void *qkv, void *out, float *running) {
    for (long task = begin; task < end; task++) {
        long clip = task / z.chunks, chunk = task % z.chunks;
        long first = z.positions * chunk / z.chunks, last = z.positions * (chunk + 1) / z.chunks;
        float *own = running + task * z.heads * RUNNING;
        for (long n = 0; n < z.heads; n++) {
            memset(own + n * RUNNING, 0, RUNNING * sizeof(float));
            own[n * RUNNING + WIDTH] = -INFINITY;
        }
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

// The CLS row of out, and state [B, N, STATE]: that row in float and its log-sum-exp; clips begin .. end.
void time_forward_cls(long begin, long end, sizes z, const void *qkv, void *out, const float *running, float *state) {
    for (long clip = begin; clip < end; clip++) {
        for (long n = 0; n < z.heads; n++) {
            float query[WIDTH], key[WIDTH], value[1][WIDTH], whole[RUNNING] = {0}, score;
            load(KIND, qkv, at_qkv(&z, clip, 0, 0, n), query, WIDTH);
            load(KIND, qkv, at_qkv(&z, clip, 0, 1, n), key, WIDTH);
            load(KIND, qkv, at_qkv(&z, clip, 0, 2, n), value[0], WIDTH);
            score = z.scale * dot(query, key);
            whole[WIDTH] = -INFINITY;
            extend(whole, &score, value, 1);
            for (long chunk = 0; chunk < z.chunks; chunk++) {
                const float *part = running + ((clip * z.chunks + chunk) * z.heads + n) * RUNNING;
                float maximum = part[WIDTH] > whole[WIDTH] ? part[WIDTH] : whole[WIDTH];
                float kept = exp_negative(whole[WIDTH] - maximum), added = exp_negative(part[WIDTH] - maximum);
                for (int d = 0; d < WIDTH; d++) whole[d] = kept * whole[d] + added * part[d];
                whole[WIDTH + 1] = kept * whole[WIDTH + 1] + added * part[WIDTH + 1];
                whole[WIDTH] = maximum;
            }
            float *own = state + (clip * z.heads + n) * STATE;
            for (int d = 0; d < WIDTH; d++) own[d] = whole[d] / whole[WIDTH + 1];
            own[WIDTH] = whole[WIDTH] + logf(whole[WIDTH + 1]);
            store(KIND, out, at_out(&z, clip, 0, n), own, WIDTH);
        }
    }
}

// Gradients of the patches' q, k and v, and each task's share of those of CLS, sums [B, chunks, N, 3, WIDTH].
void time_backward(long begin, long end, sizes z, const void *qkv, const void *grad_out, const float *state,
                   void *grad_qkv, float *sums) {
    for (long task = begin; task < end; task++) {
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
                const float *cls_query = cls[n][0], *cls_grad = cls[n][3];
                memcpy(key[0], cls[n][1], sizeof key[0]);
                memcpy(value[0], cls[n][2], sizeof value[0]);
                float cls_delta = dot(cls_grad, own);
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
                    float cls_p = exp_negative(z.scale * dot(cls_query, key[u]) - own[WIDTH]);
                    float cls_ds = z.scale * cls_p * (dot(cls_grad, value[u]) - cls_delta);
                    add(cls_sums[0], cls_ds, key[u]);
                    for (int d = 0; d < WIDTH; d++) row[d] = cls_ds * cls_query[d];
                    for (int t = 0; t < FRAMES; t++) add(row, ds[t][u], query[t]);
                    store(KIND, grad_qkv, at_qkv(&z, clip, token, 1, n), row, WIDTH);
                    for (int d = 0; d < WIDTH; d++) row[d] = cls_p * cls_grad[d];
                    for (int t = 0; t < FRAMES; t++) add(row, p[t][u], grad[t]);
                    store(KIND, grad_qkv, at_qkv(&z, clip, token, 2, n), row, WIDTH);
                }
            }
        }
    }
}

// Gradients of the q, k and v of CLS: its own part and the tasks' sums; clips begin .. end.
void time_backward_cls(long begin, long end, sizes z, const void *qkv, const void *grad_out, const float *state,
                       void *grad_qkv, const float *sums) {
    for (long clip = begin; clip < end; clip++) {
        for (long n = 0; n < z.heads; n++) {
            float query[WIDTH], key[WIDTH], value[WIDTH], grad[WIDTH], rows[3][WIDTH];
            const float *own = state + (clip * z.heads + n) * STATE;
            load(KIND, qkv, at_qkv(&z, clip, 0, 0, n), query, WIDTH);
            load(KIND, qkv, at_qkv(&z, clip, 0, 1, n), key, WIDTH);
            load(KIND, qkv, at_qkv(&z, clip, 0, 2, n), value, WIDTH);
            load(KIND, grad_out, at_out(&z, clip, 0, n), grad, WIDTH);
            float p = exp_negative(z.scale * dot(query, key) - own[WIDTH]);
            float ds = z.scale * p * (dot(grad, value) - dot(grad, own));
            for (int d = 0; d < WIDTH; d++) {
                rows[0][d] = ds * key[d];
                rows[1][d] = ds * query[d];
                rows[2][d] = p * grad[d];
            }
            for (long chunk = 0; chunk < z.chunks; chunk++) {
                const float *part = sums + ((clip * z.chunks + chunk) * z.heads + n) * 3 * WIDTH;
                for (int i = 0; i < 3; i++) add(rows[i], 1, part + i * WIDTH);
            }
            for (int i = 0; i < 3; i++) store(KIND, grad_qkv, at_qkv(&z, clip, 0, i, n), rows[i], WIDTH);
        }
    }
}
