// Divided attention over space: what stands around its matrix products. A frame's tokens are gathered from the packed qkv
// into a matrix per head, small enough to stay in cache between products, and their gradients put back, with the CLS row's
// share added before rounding; see cls.h for the layout and for that row. Macros: KIND, WIDTH.
//
// A call is a run of frames that starts at `first`, counted over clips (sizes' chunks are the frames of a clip); a task is
// a head of a frame, frames x N of them. Matrices: key and value [tasks, 1 + P, D] with CLS first; query, and the output,
// [tasks, R, D], R = P, or R = 1 + P with CLS first at one frame, where CLS is a query like any.

#include "cls.h"

enum { ROW_BYTES = WIDTH * (KIND == 0 ? 4 : 2) };

static inline char *row_of(void *base, size_t element) { return (char *)base + element * bytes_of(KIND); }
static inline const char *const_row_of(const void *base, size_t element) {
    return (const char *)base + element * bytes_of(KIND);
}

// Element of row r of a task's matrix of `rows` rows.
static inline size_t at_matrix(long task, long rows, long r) { return (size_t)(task * rows + r) * WIDTH; }

// The token that is row r, 0 <= r <= P, of the keys of a frame.
static inline long token_of(const sizes *z, long frame, long r) { return r ? frame % z->frames * z->positions + r : 0; }

// Query, key and value from qkv, and the frames' parts of running [B, T, N, RUNNING] of the CLS row unless it is NULL.
void space_gather(long tasks, int threads, sizes z, long first, const void *qkv, void *query, void *key, void *value,
                  float *running) {
    long merged = z.frames == 1, keys = 1 + z.positions, queries = z.positions + merged;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long frame = first + task / z.heads, n = task % z.heads, clip = frame / z.frames;
        float cls_query[WIDTH], *own = running ? running + (frame * z.heads + n) * RUNNING : NULL;
        load(KIND, qkv, at_qkv(&z, clip, 0, 0, n), cls_query, WIDTH);
        if (own) start(own, 1);
        for (long r = 0; r < keys; r++) {
            long token = token_of(&z, frame, r);
            const char *from = const_row_of(qkv, at_qkv(&z, clip, token, 1, n));
            memcpy(row_of(key, at_matrix(task, keys, r)), from, ROW_BYTES);
            from = const_row_of(qkv, at_qkv(&z, clip, token, 2, n));
            memcpy(row_of(value, at_matrix(task, keys, r)), from, ROW_BYTES);
            if (r || merged) {
                from = const_row_of(qkv, at_qkv(&z, clip, token, 0, n));
                memcpy(row_of(query, at_matrix(task, queries, r - !merged)), from, ROW_BYTES);
            }
            if (r && own) {
                float one_key[WIDTH], one_value[1][WIDTH], score;
                load(KIND, qkv, at_qkv(&z, clip, token, 1, n), one_key, WIDTH);
                load(KIND, qkv, at_qkv(&z, clip, token, 2, n), one_value[0], WIDTH);
                score = z.scale * dot(cls_query, one_key);
                extend(own, &score, one_value, 1);
            }
        }
    }
}

// Rows of [B, S, N, D] from a matrix like query, or, with `back`, such a matrix from the rows.
void space_rows(long tasks, int threads, sizes z, long first, void *tokens, void *matrix, long back) {
    long merged = z.frames == 1, queries = z.positions + merged;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long frame = first + task / z.heads, n = task % z.heads;
        for (long r = 0; r < queries; r++) {
            char *row = row_of(tokens, at_out(&z, frame / z.frames, token_of(&z, frame, r + !merged), n));
            char *packed = row_of(matrix, at_matrix(task, queries, r));
            if (back) memcpy(packed, row, ROW_BYTES);
            else memcpy(row, packed, ROW_BYTES);
        }
    }
}

// grad_qkv from the gradients of query, key and value and, at several frames, from the CLS row; what concerns CLS goes
// into the frames' parts of sums [B, T, N, 3, WIDTH], which cls_backward adds up.
void space_scatter(long tasks, int threads, sizes z, long first, const void *grad_query, const void *grad_key,
                   const void *grad_value, const void *qkv, const void *grad_out, const float *state, void *grad_qkv,
                   float *sums) {
    long merged = z.frames == 1, keys = 1 + z.positions, queries = z.positions + merged;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long frame = first + task / z.heads, n = task % z.heads, clip = frame / z.frames;
        float cls[4][WIDTH];
        load_cls_head(&z, qkv, grad_out, clip, n, cls);
        const float *own = state + (clip * z.heads + n) * STATE;
        float (*own_sums)[WIDTH] = (float (*)[WIDTH])(sums + (frame * z.heads + n) * 3 * WIDTH);
        for (long r = 0; r < keys; r++) {
            long token = token_of(&z, frame, r);
            size_t source = at_matrix(task, keys, r);
            if (r || merged) {
                const char *from = const_row_of(grad_query, at_matrix(task, queries, r - !merged));
                memcpy(row_of(grad_qkv, at_qkv(&z, clip, token, 0, n)), from, ROW_BYTES);
            }
            if (merged) {
                memcpy(row_of(grad_qkv, at_qkv(&z, clip, token, 1, n)), const_row_of(grad_key, source), ROW_BYTES);
                memcpy(row_of(grad_qkv, at_qkv(&z, clip, token, 2, n)), const_row_of(grad_value, source), ROW_BYTES);
                continue;
            }
            if (!r) {
                for (int d = 0; d < WIDTH; d++) own_sums[0][d] = 0;
                load(KIND, grad_key, source, own_sums[1], WIDTH);
                load(KIND, grad_value, source, own_sums[2], WIDTH);
                continue;
            }
            float key[WIDTH], value[WIDTH], key_share[WIDTH], value_share[WIDTH], row[WIDTH];
            load(KIND, qkv, at_qkv(&z, clip, token, 1, n), key, WIDTH);
            load(KIND, qkv, at_qkv(&z, clip, token, 2, n), value, WIDTH);
            cls_share(&z, own, cls, key, value, own_sums, key_share, value_share);
            load(KIND, grad_key, source, row, WIDTH);
            add(key_share, 1, row);
            load(KIND, grad_value, source, row, WIDTH);
            add(value_share, 1, row);
            store(KIND, grad_qkv, at_qkv(&z, clip, token, 1, n), key_share, WIDTH);
            store(KIND, grad_qkv, at_qkv(&z, clip, token, 2, n), value_share, WIDTH);
        }
    }
}
