// gelu(x + bias), forward and backward, the bias's gradient in the same pass.
// Macros: APPROXIMATE 0 the exact GELU, 1 v * sigmoid(1.702 v), 2 the tanh form; KIND of x, out and their gradients. Rows
// and columns as in x [R, D]; bias and its gradient's parts are float.

#include "common.h"

enum { TILE = 512 };

#if APPROXIMATE

// sigmoid(u), and the derivative of v * sigmoid(u): u = 1.702 v, or sqrt(8 / pi) (v + 0.044715 v^3), where
// 0.5 (1 + tanh(u / 2)) = sigmoid(u).
static inline float factor(float v, float *slope) {
#if APPROXIMATE == 1
    float u = 1.702f * v, u_slope = 1.702f;
#else
    float u = v * (1.595769122f + 0.0713548163f * v * v), u_slope = 1.595769122f + 0.2140644488f * v * v;
#endif
    float power = exp_negative(-fabsf(u));
    float inverse = 1.0f / (1.0f + power);
    float share = v < 0 ? power * inverse : inverse;
    *slope = share * (1.0f + v * u_slope * (1.0f - share));
    return share;
}

#else

// Phi(v), and the derivative of v * Phi(v); erf after Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
static inline float factor(float v, float *slope) {
    float t = 1.0f / (1.0f + 0.3275911f * 0.707106781f * fabsf(v));
    float series = 1.061405429f;
    series = series * t - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    float bell = exp_negative(-0.5f * v * v);
    float tail = 0.5f * series * t * bell;
    float share = v < 0 ? tail : 1.0f - tail;
    *slope = share + 0.39894228f * v * bell;
    return share;
}

#endif

// A task is a row.
void bias_gelu_forward(long tasks, int threads, long columns, const void *x, const float *bias, void *out) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < tasks; row++) {
        for (long start = 0; start < columns; start += TILE) {
            long count = columns - start < TILE ? columns - start : TILE;
            float value[TILE];
            load(KIND, x, row * columns + start, value, count);
            for (long i = 0; i < count; i++) {
                float v = value[i] + bias[start + i], slope;
                value[i] = v * factor(v, &slope);
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
                    float slope;
                    factor(value[i] + bias[start + i], &slope);
                    upper[i] *= slope;
                    part[start + i] += upper[i];
                }
                store(KIND, grad, row * columns + start, upper, count);
            }
        }
    }
}
