// gelu(x + bias) with the exact GELU, forward and backward, the bias's gradient in the same pass.
// Macro: KIND of x, out and their gradients. Rows and columns as in x [R, D]; bias and its gradient's parts are float.

#include "common.h"

enum { TILE = 512 };

// Phi(v), and e^(-v*v/2) by the way; erf after Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
static inline float normal(float v, float *bell) {
    float t = 1.0f / (1.0f + 0.3275911f * 0.707106781f * fabsf(v));
    float series = 1.061405429f;
    series = series * t - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    *bell = exp_negative(-0.5f * v * v);
    float tail = 0.5f * series * t * *bell;
    return v < 0 ? tail : 1.0f - tail;
}

// A task is a row.
void bias_gelu_forward(long tasks, int threads, long columns, const void *x, const float *bias, void *out) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < tasks; row++) {
        for (long start = 0; start < columns; start += TILE) {
            long count = columns - start < TILE ? columns - start : TILE;
            float value[TILE];
            load(KIND, x, row * columns + start, value, count);
            for (long i = 0; i < count; i++) {
                float v = value[i] + bias[start + i], bell;
                value[i] = v * normal(v, &bell);
            }
            store(KIND, out, row * columns + start, value, count);
        }
    }
}

// The gradient of x, and of the bias by task: parts [tasks, D]. Task i of `tasks` has rows R*i/tasks .. R*(i+1)/tasks.
void bias_gelu_backward(long tasks, int threads, long rows, long columns, const void *grad_out, const void *x,
                        const float *bias, void *grad, float *parts) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        float *part = parts + task * columns;
        memset(part, 0, columns * sizeof(float));
        for (long row = rows * task / tasks; row < rows * (task + 1) / tasks; row++) {
            for (long start = 0; start < columns; start += TILE) {
                long count = columns - start < TILE ? columns - start : TILE;
                float value[TILE], upper[TILE];
                load(KIND, x, row * columns + start, value, count);
                load(KIND, grad_out, row * columns + start, upper, count);
                for (long i = 0; i < count; i++) {
                    float v = value[i] + bias[start + i], bell;
                    float share = normal(v, &bell);
                    upper[i] *= share + 0.39894228f * v * bell;
                    part[start + i] += upper[i];
                }
                store(KIND, grad, row * columns + start, upper, count);
            }
        }
    }
}
