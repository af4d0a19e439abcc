// Divided attention over space: what stands around its matrix products. Tokens are gathered from the packed qkv into
// matrices per clip, frame and head, and their gradients put back, with the CLS row's share added before rounding; see
// cls.h for the layout and for that row. Macros: KIND, WIDTH.
//
// A task is a frame of a clip (sizes' chunks are the frames). Matrices: key and value [B, T, N, 1 + P, D] with CLS first;
// query, and the output, [B, T, N, R, D], R = P, or R = 1 + P with CLS first at one frame, where CLS is a query like any.

#include "cls.h"

enum { ROW_BYTES = WIDTH * (KIND == 0 ? 4 : 2) };

static inline char *row_of(void *base, size_t element) { return (char *)base + element * bytes_of(KIND); }
static inline const char *const_row_of(const void *base, size_t element) {
    return (const char *)base + element * bytes_of(KIND);
}

// Element of row r of a matrix of `rows` rows, for a task and head.
static inline size_t at_matrix(const sizes *z, long task, long head, long rows, long r) {
    return (size_t)((task * z->heads + head) * rows + r) * WIDTH;
}

// The token that is row r, 0 <= r <= P, of the keys of a frame.
static inline long token_of(const sizes *z, long frame, long r) { return r ? frame * z->positions + r : 0; }

// By task: query, key and value from qkv, and running [B, T, N, RUNNING] of the CLS row unless it is NULL.
void space_gather(long tasks, int threads, sizes z, const void *qkv, void *query, void *key, void *value, float *running) {
    long merged = z.frames == 1, keys = 1 + z.positions, queries = z.positions + merged;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long clip = task / z.frames, frame = task % z.frames;
        float cls[z.heads][4][WIDTH];
        load_cls(&z, qkv, NULL, clip, cls);
        if (running) start(running + task * z.heads * RUNNING, z.heads);
        for (long r = 0; r < keys; r++) {
            long token = token_of(&z, frame, r);
            for (long n = 0; n < z.heads; n++) {
                const char *from = const_row_of(qkv, at_qkv(&z, clip, token, 1, n));
                memcpy(row_of(key, at_matrix(&z, task, n, keys, r)), from, ROW_BYTES);
                from = const_row_of(qkv, at_qkv(&z, clip, token, 2, n));
                memcpy(row_of(value, at_matrix(&z, task, n, keys, r)), from, ROW_BYTES);
                if (r || merged) {
                    from = const_row_of(qkv, at_qkv(&z, clip, token, 0, n));
                    memcpy(row_of(query, at_matrix(&z, task, n, queries, r - !merged)), from, ROW_BYTES);
                }
                if (r && running) {
                    float one_key[WIDTH], one_value[1][WIDTH], score;
                    load(KIND, qkv, at_qkv(&z, clip, token, 1, n), one_key, WIDTH);
                    load(KIND, qkv, at_qkv(&z, clip, token, 2, n), one_value[0], WIDTH);
                    score = z.scale * dot(cls[n][0], one_key);
                    extend(running + (task * z.heads + n) * RUNNING, &score, one_value, 1);
                }
            }
        }
    }
}

// By task: rows of [B, S, N, D] from a matrix like query, or, with `back`, such a matrix from the rows.
void space_rows(long tasks, int threads, sizes z, void *tokens, void *matrix, long back) {
    long merged = z.frames == 1, queries = z.positions + merged;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        for (long r = 0; r < queries; r++) {
            long token = token_of(&z, task % z.frames, r + !merged);
            for (long n = 0; n < z.heads; n++) {
                char *row = row_of(tokens, at_out(&z, task / z.frames, token, n));
                char *packed = row_of(matrix, at_matrix(&z, task, n, queries, r));
                if (back) memcpy(packed, row, ROW_BYTES);
                else memcpy(row, packed, ROW_BYTES);
            }
        }
    }
}

// By task: grad_qkv from the gradients of query, key and value and, at several frames, from the CLS row;
// what concerns CLS goes into sums [B, T, N, 3, WIDTH], which cls_backward adds up.
void space_scatter(long tasks, int threads, sizes z, const void *grad_query, const void *grad_key, const void *grad_value,
                   const void *qkv, const void *grad_out, const float *state, void *grad_qkv, float *sums) {
    long merged = z.frames == 1, keys = 1 + z.positions, queries = z.positions + merged;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long clip = task / z.frames, frame = task % z.frames;
        float cls[z.heads][4][WIDTH];
        load_cls(&z, qkv, grad_out, clip, cls);
        for (long r = 0; r < keys; r++) {
            long token = token_of(&z, frame, r);
            for (long n = 0; n < z.heads; n++) {
                size_t source = at_matrix(&z, task, n, keys, r);
                if (r || merged) {
                    const char *from = const_row_of(grad_query, at_matrix(&z, task, n, queries, r - !merged));
                    memcpy(row_of(grad_qkv, at_qkv(&z, clip, token, 0, n)), from, ROW_BYTES);
                }
                if (merged) {
                    memcpy(row_of(grad_qkv, at_qkv(&z, clip, token, 1, n)), const_row_of(grad_key, source), ROW_BYTES);
                    memcpy(row_of(grad_qkv, at_qkv(&z, clip, token, 2, n)), const_row_of(grad_value, source), ROW_BYTES);
                    continue;
                }
                float (*own_sums)[WIDTH] = (float (*)[WIDTH])(sums + (task * z.heads + n) * 3 * WIDTH);
                if (!r) {
                    for (int d = 0; d < WIDTH; d++) own_sums[0][d] = 0;
                    load(KIND, grad_key, source, own_sums[1], WIDTH);
                    load(KIND, grad_value, source, own_sums[2], WIDTH);
                    continue;
                }
                float key[WIDTH], value[WIDTH], key_share[WIDTH], value_share[WIDTH], row[WIDTH];
                load(KIND, qkv, at_qkv(&z, clip, token, 1, n), key, WIDTH);
                load(KIND, qkv, at_qkv(&z, clip, token, 2, n), value, WIDTH);
                const float *own = state + (clip * z.heads + n) * STATE;
                cls_share(&z, own, cls[n], key, value, own_sums, key_share, value_share);
                load(KIND, grad_key, source, row, WIDTH);
                add(key_share, 1, row);
                load(KIND, grad_value, source, row, WIDTH);
                add(value_share, 1, row);
                store(KIND, grad_qkv, at_qkv(&z, clip, token, 1, n), key_share, WIDTH);
                store(KIND, grad_qkv, at_qkv(&z, clip, token, 2, n), value_share, WIDTH);
            }
        }
    }
}
