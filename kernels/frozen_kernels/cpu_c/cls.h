// The CLS row of divided attention, for the kernels of both axes: a softmax over all tokens, gathered task by task while
// the kernels read the tokens, and added up in the order of the tasks, so that no result depends on the number of threads.
// Macros: KIND of the elements, WIDTH of a head. Layout: qkv [B, S, 3, N, D], out and its gradient [B, S, N, D],
// S = 1 + frames * positions, CLS first, then frame by frame. Everything is computed in float.

#include "common.h"

typedef struct {
    long frames, positions, heads, chunks;  // chunks: tasks per clip
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
    return (size_t)(((clip * (1 + z->frames * z->positions) + token) * 3 + part) * z->heads + head) * WIDTH;
}

static inline size_t at_out(const sizes *z, long clip, long token, long head) {
    return (size_t)((clip * (1 + z->frames * z->positions) + token) * z->heads + head) * WIDTH;
}

// The rows of CLS of a head in float: q, k, v and, where grad_out is given, the gradient of out.
static inline void load_cls_head(const sizes *z, const void *qkv, const void *grad_out, long clip, long n,
                                 float (*rows)[WIDTH]) {
    for (int part = 0; part < 3; part++) load(KIND, qkv, at_qkv(z, clip, 0, part, n), rows[part], WIDTH);
    if (grad_out) load(KIND, grad_out, at_out(z, clip, 0, n), rows[3], WIDTH);
}

// The same of all heads.
static inline void load_cls(const sizes *z, const void *qkv, const void *grad_out, long clip, float (*rows)[4][WIDTH]) {
    for (long n = 0; n < z->heads; n++) load_cls_head(z, qkv, grad_out, clip, n, rows[n]);
}

// Empties the running softmaxes of all heads.
static inline void start(float *running, long heads) {
    memset(running, 0, heads * RUNNING * sizeof(float));
    for (long n = 0; n < heads; n++) running[n * RUNNING + WIDTH] = -INFINITY;
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

// The share of one token, key and value u, in the gradients that the CLS row sends back: own is its state, cls its q, k, v
// and gradient, sums its gathered [3][WIDTH]. Sets grad_key and grad_value.
static inline void cls_share(const sizes *z, const float *own, float (*cls)[WIDTH], const float *key, const float *value,
                             float (*sums)[WIDTH], float *grad_key, float *grad_value) {
    float p = exp_negative(z->scale * dot(cls[0], key) - own[WIDTH]);
    float ds = z->scale * p * (dot(cls[3], value) - dot(cls[3], own));
    add(sums[0], ds, key);
    for (int d = 0; d < WIDTH; d++) grad_key[d] = ds * cls[0][d];
    for (int d = 0; d < WIDTH; d++) grad_value[d] = p * cls[3][d];
}

// The CLS row of out, and state [B, N, STATE]: that row in float and its log-sum-exp; a task is a clip.
void cls_forward(long tasks, int threads, sizes z, const void *qkv, void *out, const float *running, float *state) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long clip = 0; clip < tasks; clip++) {
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

// Gradients of the q, k and v of CLS: its own part and the tasks' sums; a task is a clip.
void cls_backward(long tasks, int threads, sizes z, const void *qkv, const void *grad_out, const float *state,
                       void *grad_qkv, const float *sums) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long clip = 0; clip < tasks; clip++) {
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
