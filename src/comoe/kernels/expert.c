/* One expert on a few tokens: y = down(act(up(x))), from weights in any of the pack's codes.
 *
 * Every row of weights is decoded once into a float buffer that stays in L1 and multiplied with all tokens, so a
 * token's result depends on its own input alone, and neither on how many tokens come with it nor on threads.
 * Accumulation is float32 in LANES * CHAINS partial sums, added in a fixed order.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "clones.h"

enum code { F32 = 0, BF16 = 1, F16 = 2, Q4 = 3, Q8 = 4, Q2 = 5, Q3 = 6 };
enum act { RELU = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

#define LANES 16
#define CHAINS 2
#define STEP (LANES * CHAINS)

typedef struct {
    int32_t code, group;
    int64_t rows, cols;
    const uint8_t *weight;  /* elements, or nibbles + 8 or pairs of bits: the first neighbour in the lowest bits */
    const uint16_t *scales; /* float16 (rows, cols / group), from Q4 on */
    const uint8_t *low;     /* second plane of Q8 and Q3 */
} comoe_matrix;

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
    /* exact for subnormals too: scale a float with the half's bits by 2^112 */
    return from_bits(sign | (rest << 13)) * 0x1p112f;
}

/* Row `r` of a matrix of two or three bits in split order: columns 4j, then 4j + 1, 4j + 2 and 4j + 3.
 * Long loops without branches: scales are spread over the last quarter first, which is written last. */
INLINE void decode_low_bits(const comoe_matrix *m, int64_t r, float *restrict out) {
    int64_t cols = m->cols, quarter = cols / 4, eighth = cols / 8, per = m->group / 4;
    const uint8_t *two = m->weight + r * quarter;
    const uint16_t *scales = m->scales + r * (cols / m->group);
    float *spread = out + 3 * quarter;
    for (int64_t g = 0; g < quarter; g += per) {
        float scale = from_half(*scales++);
        for (int64_t j = g; j < g + per; j++) spread[j] = scale;
    }
    for (int k = 0; k < 4; k++) {
        float *o = out + k * quarter;
        if (m->code == Q2) {
            for (int64_t j = 0; j < quarter; j++) o[j] = spread[j] * (float)((int32_t)(two[j] >> (2 * k) & 3) - 2);
            continue;
        }
        const uint8_t *one = m->low + r * eighth;
        for (int half = 0; half < 2; half++, o += eighth) {
            const uint8_t *t = two + half * eighth;
            const float *s = spread + half * eighth;
            for (int64_t j = 0; j < eighth; j++)
                o[j] = s[j] * (float)(2 * (int32_t)(t[j] >> (2 * k) & 3) + (one[j] >> (4 * half + k) & 1) - 4);
        }
    }
}

/* Row `r` of `m` as floats. Quantised rows come in split order: even columns, then odd ones. */
INLINE void decode_row(const comoe_matrix *m, int64_t r, float *restrict out) {
    int64_t cols = m->cols, half = cols / 2, per = m->group / 2;
    if (m->code == BF16) {
        const uint16_t *w = (const uint16_t *)m->weight + r * cols;
        for (int64_t j = 0; j < cols; j++) out[j] = from_bits((uint32_t)w[j] << 16);
    } else if (m->code == F16) {
        const uint16_t *w = (const uint16_t *)m->weight + r * cols;
        for (int64_t j = 0; j < cols; j++) out[j] = from_half(w[j]);
    } else if (m->code >= Q2) {
        decode_low_bits(m, r, out);
    } else {
        const uint8_t *high = m->weight + r * half;
        const uint16_t *scales = m->scales + r * (cols / m->group);
        for (int64_t g = 0; g < half; g += per) {
            float scale = from_half(*scales++);
            if (m->code == Q4) {
                for (int64_t j = g; j < g + per; j++) {
                    out[j] = scale * (float)((int32_t)(high[j] & 15) - 8);
                    out[half + j] = scale * (float)((int32_t)(high[j] >> 4) - 8);
                }
            } else {
                const uint8_t *low = m->low + r * half;
                scale *= 0.125f;
                for (int64_t j = g; j < g + per; j++) {
                    out[j] = scale * (float)(8 * ((int32_t)(high[j] & 15) - 8) + (int32_t)(low[j] & 15) - 8);
                    out[half + j] = scale * (float)(8 * ((int32_t)(high[j] >> 4) - 8) + (int32_t)(low[j] >> 4) - 8);
                }
            }
        }
    }
}

INLINE float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sums[STEP] = {0};
    int64_t j = 0;
    for (; j + STEP <= n; j += STEP)
        for (int l = 0; l < STEP; l++) sums[l] += a[j + l] * b[j + l];
    float total = 0;
    for (int l = 0; l < STEP; l++) total += sums[l];
    for (; j < n; j++) total += a[j] * b[j];
    return total;
}

/* y (T, rows) = x (T, cols) times the matrix's transpose. `split` (T, cols) and `row` (cols) are scratch. */
CLONES static void linear(const comoe_matrix *m, const float *restrict x, float *restrict y, int64_t T,
                          float *restrict split, float *restrict row) {
    int64_t cols = m->cols;
    if (m->code >= Q4) {
        int64_t ways = m->code >= Q2 ? 4 : 2, part = cols / ways;
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < ways; k++)
                for (int64_t j = 0; j < part; j++) split[t * cols + k * part + j] = x[t * cols + ways * j + k];
        x = split;
    }
    for (int64_t r = 0; r < m->rows; r++) {
        const float *w = (const float *)m->weight + r * cols;
        if (m->code != F32) {
            decode_row(m, r, row);
            w = row;
        }
        for (int64_t t = 0; t < T; t++) y[t * m->rows + r] = dot(w, x + t * cols, cols);
    }
}

static float activate(int act, float v) {
    switch (act) {
    case RELU: return v > 0 || v != v ? v : 0;
    case SILU: return v / (1 + expf(-v));
    case GELU: return 0.5f * v * (1 + erff(v * 0.70710678f));
    default: return 0.5f * v * (1 + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    }
}

/* y (T, down->rows) for x (T, up->cols). A gated up has rows (2I): gates, then values. -1 when memory is short. */
int comoe_expert(const comoe_matrix *up, const comoe_matrix *down, int act, int gated, const float *x, float *y,
                 int64_t T) {
    int64_t inner = down->cols, widest = up->cols > inner ? up->cols : inner;
    float *scratch = malloc(sizeof(float) * (size_t)(T * (up->rows + inner + widest) + widest));
    if (!scratch) return -1;
    float *hidden = scratch, *active = hidden + T * up->rows, *split = active + T * inner, *row = split + T * widest;
    linear(up, x, hidden, T, split, row);
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = 0; j < inner; j++) {
            float value = activate(act, hidden[t * up->rows + j]);
            active[t * inner + j] = gated ? value * hidden[t * up->rows + inner + j] : value;
        }
    linear(down, active, y, T, split, row);
    free(scratch);
    return 0;
}

/* y (T, rows) = x (T, cols) times the matrix's transpose. -1 when memory is short. */
int comoe_linear(const comoe_matrix *m, const float *x, float *y, int64_t T) {
    float *scratch = malloc(sizeof(float) * (size_t)((T + 1) * m->cols));
    if (!scratch) return -1;
    linear(m, x, y, T, scratch + m->cols, scratch);
    free(scratch);
    return 0;
}

/* The widest instruction set that a clone was made for and that this processor has. */
const char *comoe_kernel_isa(void) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
    return "x86-64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "generic";
#endif
}
