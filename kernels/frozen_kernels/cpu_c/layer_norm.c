// Residual sum and LayerNorm in one pass, forward and backward. Macros: the kinds of X, BRANCH (-1: none), STREAM, NORMED,
// and GRAD_BRANCH, the branch's gradient where it is another tensor than the stream's (-1: none). Rows and columns as in
// x [R, D]; weight, bias, branch_bias (NULL: none), statistics [R, 2] (mean and 1/deviation) and the parts of the weight's
// and biases' gradients are float.

#include "common.h"

// A task is a row. total is NULL where the sum is not kept.
void layer_norm_forward(long tasks, int threads, long columns, float eps, const void *x, const void *branch,
                        const float *branch_bias, const float *weight, const float *bias, void *total, void *normed,
                        float *statistics) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < tasks; row++) {
        float value[columns], addend[columns];
        load(X, x, row * columns, value, columns);
        if (BRANCH >= 0) {
            load(BRANCH, branch, row * columns, addend, columns);
            for (long i = 0; i < columns; i++) value[i] += addend[i];
        }
        if (branch_bias) for (long i = 0; i < columns; i++) value[i] += branch_bias[i];
        if (total) {
            store(STREAM, total, row * columns, value, columns);
            if (STREAM != 0) load(STREAM, total, row * columns, value, columns);
        }
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

// Gradients of the stream and of the branch; those of weight, bias and (sum_branch) branch_bias by task, parts
// [2 or 3, tasks, D]: task i of `tasks` has rows R*i/tasks .. R*(i+1)/tasks. stream is the sum, or x, to which branch and
// branch_bias are added again. grad_stream is NULL where the stream went nowhere else; with `through` it is none of the
// branch's gradient.
void layer_norm_backward(long tasks, int threads, long rows, long columns, int sum_branch, int through,
                         const void *grad_stream, const void *grad_normed, const void *stream, const void *branch,
                         const float *branch_bias, const float *weight, const float *statistics, void *grad,
                         void *grad_branch, float *parts) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < tasks; task++) {
        float value[columns], upper[columns];
        float *weight_part = parts + task * columns, *bias_part = parts + (tasks + task) * columns;
        float *branch_part = parts + (2 * tasks + task) * columns;
        memset(weight_part, 0, columns * sizeof(float));
        memset(bias_part, 0, columns * sizeof(float));
        if (sum_branch) memset(branch_part, 0, columns * sizeof(float));
        for (long row = rows * task / tasks; row < rows * (task + 1) / tasks; row++) {
            load(STREAM, stream, row * columns, value, columns);
            if (BRANCH >= 0) {
                load(BRANCH, branch, row * columns, upper, columns);
                for (long i = 0; i < columns; i++) value[i] += upper[i];
            }
            if (branch_bias) for (long i = 0; i < columns; i++) value[i] += branch_bias[i];
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
            if (grad_stream) load(STREAM, grad_stream, row * columns, upper, columns);
            if (grad_stream && !through) for (long i = 0; i < columns; i++) value[i] += upper[i];
            if (GRAD_BRANCH >= 0) store(GRAD_BRANCH, grad_branch, row * columns, value, columns);
            if (sum_branch) for (long i = 0; i < columns; i++) branch_part[i] += value[i];
            if (grad_stream && through) for (long i = 0; i < columns; i++) value[i] += upper[i];
            store(STREAM, grad, row * columns, value, columns);
        }
    }
}
