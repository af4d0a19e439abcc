// What the kernels share: elements of three types read as float, and an exponential that vectorises.
// KIND of an element: 0 float32, 1 bfloat16, 2 float16. A kernel's kinds and sizes are macros, fixed when it is built.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline __attribute__((always_inline)) size_t bytes_of(int kind) { return kind == 0 ? 4 : 2; }

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// to[0 .. count) = elements base[index .. index + count).
static inline __attribute__((always_inline)) void load(int kind, const void *base, size_t index, float *to, long count) {
    if (kind == 0) {
        const float *from = (const float *)base + index;
        for (long i = 0; i < count; i++) to[i] = from[i];
    } else if (kind == 1) {
        const uint16_t *from = (const uint16_t *)base + index;
        for (long i = 0; i < count; i++) to[i] = from_bfloat16(from[i]);
    } else {
#ifdef __FLT16_MAX__
        const _Float16 *from = (const _Float16 *)base + index;
        for (long i = 0; i < count; i++) to[i] = (float)from[i];
#endif
    }
}

// Elements base[index .. index + count) = from[0 .. count).
static inline __attribute__((always_inline)) void store(int kind, void *base, size_t index, const float *from, long count) {
    if (kind == 0) {
        float *to = (float *)base + index;
        for (long i = 0; i < count; i++) to[i] = from[i];
    } else if (kind == 1) {
        uint16_t *to = (uint16_t *)base + index;
        for (long i = 0; i < count; i++) to[i] = to_bfloat16(from[i]);
    } else {
#ifdef __FLT16_MAX__
        _Float16 *to = (_Float16 *)base + index;
        for (long i = 0; i < count; i++) to[i] = (_Float16)from[i];
#endif
    }
}

// e^x for x <= 0, absolute error below 2e-7; 0 is reached at -87. NaN gives NaN.
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float power = rintf(x * 1.44269504f);
    float r = x - power * 0.693147181f;
    float series = 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return series * scale;
}
