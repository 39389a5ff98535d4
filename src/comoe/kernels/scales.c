/* Scales of low-bit groups: of some candidates the one whose levels miss the weights least. No threads, fixed order. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "clones.h"

#define LANES 16

#define HALF_MAX 65504.0f

/* The nearest float16, as a float: ties to even. Beyond HALF_MAX it is none. */
INLINE float as_half(float value) {
    float size = fabsf(value), step = 0x1p-24f; /* of subnormals */
    if (size >= 0x1p-14f) {
        uint32_t bits;
        memcpy(&bits, &size, 4);
        bits &= 0x7f800000u;
        memcpy(&step, &bits, 4);
        step *= 0x1p-10f;
    }
    return rintf(value / step) * step; /* both are exact but for rint: step is a power of two */
}

/* Squared error of `w` (n) in levels -half to half - 1 of `scale`, weighted by `importance` (n). */
INLINE float missed(const float *restrict w, const float *restrict importance, int n, float scale, float half) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
    float sums[LANES] = {0}, step = scale == 0 ? INFINITY : scale;
    int j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) {
            float level = w[j + l] / step;
            level = level < -half ? -half : level;
            level = level > half - 1 ? half - 1 : level;
            float error = ((level + magic) - magic) * scale - w[j + l];
            sums[l] += error * error * importance[j + l];
        }
    float total = 0;
    for (int l = 0; l < LANES; l++) total += sums[l];
    for (; j < n; j++) {
        float level = rintf(w[j] / step);
        level = level < -half ? -half : level > half - 1 ? half - 1 : level;
        total += (level * scale - w[j]) * (level * scale - w[j]) * importance[j];
    }
    return total;
}

/* `scales` (rows): for each row of `weight` (rows, group) the best float16 of `shares` (num) of its reach, either sign.
 * The reach puts the largest weight half a level beyond the outermost. */
CLONES void comoe_scales(const float *weight, const float *importance, int64_t rows, int group, int half,
                         const float *shares, int num, float *scales) {
    for (int64_t r = 0; r < rows; r++, weight += group) {
        float most = 0, best = 0, least = INFINITY;
        for (int j = 0; j < group; j++) most = fabsf(weight[j]) > most ? fabsf(weight[j]) : most;
        float reach = most / ((float)half - 0.5f);
        for (int k = 0; k < num; k++)
            for (int sign = 1; sign >= -1; sign -= 2) {
                float scale = as_half((float)sign * shares[k] * reach);
                if (fabsf(scale) > HALF_MAX) continue;
                float cost = missed(weight, importance, group, scale, (float)half);
                if (cost < least) least = cost, best = scale;
            }
        scales[r] = best;
    }
}
