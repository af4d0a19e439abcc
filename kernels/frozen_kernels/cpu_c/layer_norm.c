// Residual sum and LayerNorm in one pass, forward and backward. Macros: the kinds of X, BRANCH (-1: none), TOTAL, NORMED,
// and NARROW, a second dtype for the gradient of the sum (-1: none). Rows and columns as in x [R, D]; weight, bias,
// statistics [R, 2] (mean and 1/deviation) and the parts of the weight's and bias's gradients are float.

#include "common.h"

// A task is a row.
void layer_norm_forward(long tasks, int threads, long columns, float eps, const void *x, const void *branch,
                        const float *weight, const float *bias, void *total, void *normed, float *statistics) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < tasks; row++) {
        float value[columns], addend[columns];
        load(X, x, row * columns, value, columns);
        if (BRANCH >= 0) {
            load(BRANCH, branch, row * columns, addend, columns);
            for (long i = 0; i < columns; i++) value[i] += addend[i];
        }
        store(TOTAL, total, row * columns, value, columns);
        if (TOTAL != 0) load(TOTAL, total, row * columns, value, columns);
        float sum = 0, squares = 0;
        for (long i = 0; i < columns; i++) sum += value[i];
        float mean = sum / columns;
        for (long i = 0; i < columns; i++) squares += (value[i] - mean) * (value[i] - mean);
        float inverse = 1.0f / sqrtf(squares / columns + eps);
        for (long i = 0; i < columns; i++) value[i] = (value[i] - mean) * inverse * weight[i] + bias[i];
        store(NORMED, normed, row * columns, value, columns);
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = inverse;
    }
}

// The gradient of the sum; of weight and bias by task, parts [2, tasks, D]: task i of `tasks` has rows R*i/tasks .. R*(i+1)/tasks.
// grad_total is NULL where the sum itself went nowhere.
void layer_norm_backward(long tasks, int threads, long rows, long columns, const void *grad_total,
                         const void *grad_normed, const void *total, const float *weight, const float *statistics,
                         void *grad, void *narrow, float *parts) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        float value[columns], upper[columns];
        float *weight_part = parts + task * columns, *bias_part = parts + (tasks + task) * columns;
        memset(weight_part, 0, columns * sizeof(float));
        memset(bias_part, 0, columns * sizeof(float));
        for (long row = rows * task / tasks; row < rows * (task + 1) / tasks; row++) {
            load(TOTAL, total, row * columns, value, columns);
            load(NORMED, grad_normed, row * columns, upper, columns);
            float mean = statistics[2 * row], inverse = statistics[2 * row + 1], level = 0, along = 0;
            for (long i = 0; i < columns; i++) {
                value[i] = (value[i] - mean) * inverse;
                weight_part[i] += upper[i] * value[i];
                bias_part[i] += upper[i];
                upper[i] *= weight[i];
                level += upper[i];
                along += upper[i] * value[i];
            }
            level /= columns;
            along /= columns;
            for (long i = 0; i < columns; i++) value[i] = (upper[i] - level - value[i] * along) * inverse;
            if (grad_total) {
                load(TOTAL, grad_total, row * columns, upper, columns);
                for (long i = 0; i < columns; i++) value[i] += upper[i];
            }
            store(TOTAL, grad, row * columns, value, columns);
            if (NARROW >= 0) store(NARROW, narrow, row * columns, value, columns);
        }
    }
}
