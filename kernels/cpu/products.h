/* Sums over eight columns at a time, in float32 whatever the weights are, and the activations between the products. */
#ifndef MOEBENCH_PRODUCTS_H
#define MOEBENCH_PRODUCTS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define COLUMNS 8 /* so many columns are added together */

enum { SILU, GELU, RELU };

struct matrix {
    const void *numbers;
    int64_t length; /* of each column (or row), which lies in one piece */
    int32_t bfloat16;
};

static inline float wide(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

#define AS_IS(value) (value)

/* add: y[0..n) += sum of x[c] * column c. dot: y[c] = row c . x[0..n). */
#define DEFINE_PRODUCTS(type, name, read)                                                                              \
    static void add_##name(float *restrict y, const type *const *w, const float *x, int64_t n)                         \
    {                                                                                                                  \
        const type *a = w[0], *b = w[1], *c = w[2], *d = w[3], *e = w[4], *f = w[5], *g = w[6], *h = w[7];             \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                            \
            y[i] += (x[0] * read(a[i]) + x[1] * read(b[i]) + x[2] * read(c[i]) + x[3] * read(d[i]))                    \
                  + (x[4] * read(e[i]) + x[5] * read(f[i]) + x[6] * read(g[i]) + x[7] * read(h[i]));                   \
    }                                                                                                                  \
    static void dot_##name(float *y, const type *const *w, const float *x, int64_t n)                                  \
    {                                                                                                                  \
        for (int k = 0; k < COLUMNS; k += 4) {                                                                         \
            const type *a = w[k], *b = w[k + 1], *c = w[k + 2], *d = w[k + 3];                                         \
            float p = 0, q = 0, r = 0, s = 0;                                                                          \
            _Pragma("omp simd reduction(+ : p, q, r, s)") for (int64_t i = 0; i < n; i++) {                            \
                p += x[i] * read(a[i]), q += x[i] * read(b[i]);                                                        \
                r += x[i] * read(c[i]), s += x[i] * read(d[i]);                                                        \
            }                                                                                                          \
            y[k] = p, y[k + 1] = q, y[k + 2] = r, y[k + 3] = s;                                                        \
        }                                                                                                              \
    }

DEFINE_PRODUCTS(float, float32, AS_IS)
DEFINE_PRODUCTS(uint16_t, bfloat16, wide)

static void add_columns(struct matrix m, const int64_t *at, const float *x, float *y, int64_t from, int64_t n)
{
    const float *full[COLUMNS];
    const uint16_t *half[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        full[c] = (const float *)m.numbers + at[c] * m.length + from;
        half[c] = (const uint16_t *)m.numbers + at[c] * m.length + from;
    }
    if (m.bfloat16) add_bfloat16(y + from, half, x, n);
    else add_float32(y + from, full, x, n);
}

static void dot_rows(struct matrix m, const int64_t *at, const float *x, float *y)
{
    const float *full[COLUMNS];
    const uint16_t *half[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        full[c] = (const float *)m.numbers + at[c] * m.length;
        half[c] = (const uint16_t *)m.numbers + at[c] * m.length;
    }
    if (m.bfloat16) dot_bfloat16(y, half, x, m.length);
    else dot_float32(y, full, x, m.length);
}

/* exp(x) to a few units in the last place, by operations that vectorise: 2^k times a polynomial of the rest. */
static inline float exponential(float x)
{
    x = fminf(fmaxf(x, -87.0f), 88.0f);
    float power = rintf(x * 1.44269504f);
    float rest = (x - power * 0.693145752f) - power * 1.42860677e-6f; /* ln 2 in two parts */
    float sum = 1.0f / 5040;
    sum = sum * rest + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    int32_t bits = ((int32_t)power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

static void activate(float *x, int64_t n, int32_t activation)
{
    if (activation == SILU)
        for (int64_t i = 0; i < n; i++) x[i] /= 1.0f + exponential(-x[i]);
    else if (activation == GELU)
        for (int64_t i = 0; i < n; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
    else
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : x[i]; /* NaN stays */
}

#endif
