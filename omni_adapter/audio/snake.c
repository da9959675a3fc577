/* What a Snake does to rows of float32, the depthwise convolution before it, and the sum behind it, each in one pass.
 *
 * Plain C, no headers but the standard ones. Every number is computed by itself and in the same order, whatever
 * stands beside it, so that rows come out in a batch as they do alone. Results that are `rounded` are bfloat16.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LEAST_WORK (1 << 14) /* numbers for which a second thread pays */
#define STRIPE 64            /* channels that are summed up together */

/* u + sin(u)^2, the square within 1e-7 for |u| up to 1e4. A sine squared repeats after half a turn, whose parts
 * have few digits: the first products are exact. */
INLINE float waved(float u)
{
    float turns = rintf(u * 0.318309886183790672f);
    float rest = ((u - turns * 3.140625f) - turns * 9.67502593994140625e-4f) - turns * 1.509957990978376432e-7f;
    float square = rest * rest;
    float sum = 2.608932482e-6f;
    sum = sum * square - 1.981111269e-4f;
    sum = sum * square + 8.333088167e-3f;
    sum = sum * square - 1.666666046e-1f;
    float sine = sum * square * rest + rest;
    return sine * sine + u;
}

/* The nearest bfloat16, the even one of two. */
INLINE uint16_t rounded_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x == x ? nearest : 0x7fc0u);
}

INLINE void write(void *out, long place, float x, int rounded)
{
    if (rounded)
        ((uint16_t *)out)[place] = rounded_bits(x);
    else
        ((float *)out)[place] = x;
}

INLINE void snake_row(const float *x, const float *scale, const float *shift, const float *after, void *out,
                      long start, long width, int rounded)
{
#pragma omp simd
    for (long i = 0; i < width; i++) {
        float u = scale ? x[start + i] * scale[i] : x[start + i];
        float wave = waved(shift ? u + shift[i] : u);
        write(out, start + i, after ? wave * after[i] : wave, rounded);
    }
}

/* One loop for each of what may be missing, so that none of them asks. */
INLINE void snake_rows(const float *x, const float *scale, const float *shift, const float *after, void *out,
                       long rows, long width, int rounded)
{
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > LEAST_WORK)
    for (long row = 0; row < rows; row++) {
        long start = row * width;
        if (!scale)
            snake_row(x, NULL, NULL, NULL, out, start, width, rounded);
        else if (shift && after)
            snake_row(x, scale, shift, after, out, start, width, rounded);
        else if (shift)
            snake_row(x, scale, shift, NULL, out, start, width, rounded);
        else if (after)
            snake_row(x, scale, NULL, after, out, start, width, rounded);
        else
            snake_row(x, scale, NULL, NULL, out, start, width, rounded);
    }
}

/* out = (u + sin(u)^2) * after, where u = x * scale + shift; without a scale, u is x and nothing comes after, and
 * without a shift or `after` these are 0 and 1. Rows are contiguous; out may be x where it is not rounded. */
void omni_snake(const float *x, const float *scale, const float *shift, const float *after, void *out, long rows,
                long width, int rounded)
{
    if (rounded)
        snake_rows(x, scale, shift, after, out, rows, width, 1);
    else
        snake_rows(x, scale, shift, after, out, rows, width, 0);
}

INLINE void convolve_part(const float *x, const float *weight, const float *bias, void *out, long start, long first,
                          long count, long width, long taps, long step, int rounded)
{
    float sums[STRIPE];
    for (long i = 0; i < count; i++)
        sums[i] = bias ? bias[first + i] : 0.0f;
    for (long tap = 0; tap < taps; tap++)
        for (long i = 0; i < count; i++)
            sums[i] += weight[tap * width + first + i] * x[start + tap * step + first + i];
#pragma omp simd
    for (long i = 0; i < count; i++)
        write(out, start + first + i, waved(sums[i]), rounded);
}

INLINE void convolve_row(const float *x, const float *weight, const float *bias, void *out, long start, long width,
                         long taps, long step, int rounded)
{
    long first = 0;
    for (; first + STRIPE <= width; first += STRIPE) /* sums stay in registers */
        convolve_part(x, weight, bias, out, start, first, STRIPE, width, taps, step, rounded);
    convolve_part(x, weight, bias, out, start, first, width - first, width, taps, step, rounded);
}

INLINE void convolve_rows(const float *x, const float *weight, const float *bias, void *out, long rows, long width,
                          long taps, long step, int rounded)
{
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > LEAST_WORK)
    for (long row = 0; row < rows; row++)
        convolve_row(x, weight, bias, out, row * width, width, taps, step, rounded);
}

/* out[row] = u + sin(u)^2, where u = bias, if there is one, + the sum over taps of weight[tap] * x[row + tap *
 * dilation]: x has as many rows as that reads, the weight is [taps, width]. */
void omni_depthwise_snake(const float *x, const float *weight, const float *bias, void *out, long rows, long width,
                          long taps, long dilation, int rounded)
{
    long step = dilation * width;
    if (rounded && taps == 7) /* as all of SNAC's are */
        convolve_rows(x, weight, bias, out, rows, width, 7, step, 1);
    else if (rounded)
        convolve_rows(x, weight, bias, out, rows, width, taps, step, 1);
    else if (taps == 7)
        convolve_rows(x, weight, bias, out, rows, width, 7, step, 0);
    else
        convolve_rows(x, weight, bias, out, rows, width, taps, step, 0);
}

/* total += factor * added, where `added` is bfloat16, and each row of `width` has its factor; none for 1. */
void omni_add_rounded(float *total, const uint16_t *added, const float *factor, long rows, long width)
{
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > LEAST_WORK)
    for (long row = 0; row < rows; row++) {
        float times = factor ? factor[row] : 1.0f;
#pragma omp simd
        for (long i = row * width; i < (row + 1) * width; i++) {
            uint32_t bits = (uint32_t)added[i] << 16;
            float number;
            memcpy(&number, &bits, sizeof number);
            total[i] += times * number;
        }
    }
}

/* out = the nearest bfloat16 to x. */
void omni_round(const float *x, uint16_t *out, long rows, long width)
{
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > LEAST_WORK)
    for (long row = 0; row < rows; row++)
#pragma omp simd
        for (long i = row * width; i < (row + 1) * width; i++)
            out[i] = rounded_bits(x[i]);
}
