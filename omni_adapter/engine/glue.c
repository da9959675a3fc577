/* What lies between the products of one step, on float32 rows.
 *
 * Plain C: rows and strides in numbers, no headers but the standard ones. Every row is computed by itself and
 * in the same order, whatever stands beside it, so that rows come out in a batch as they do alone.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LEAST_WORK (1 << 17)  /* numbers read and multiplied for which a second thread pays */
#define LEAST_GATES (1 << 15) /* and gates */

/* e^x within two units in the last place, in operations that compilers turn into vectors. */
INLINE float exponential(float x)
{
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.0f ? 88.0f : x;
    float whole = rintf(x * 1.44269504088896341f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

INLINE float dot(const float *left, const float *right, long width)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++)
        sum += left[i] * right[i];
    return sum;
}

INLINE void normalise(const float *x, const float *weight, float offset, float epsilon, float *out, long width)
{
    float factor = 1.0f / sqrtf(dot(x, x, width) / (float)width + epsilon);
    if (weight)
        for (long i = 0; i < width; i++)
            out[i] = x[i] * factor * (weight[i] + offset);
    else
        for (long i = 0; i < width; i++)
            out[i] = x[i] * factor;
}

/* out = norm(x + scale * added), where the norm divides by the root of the mean square. With `added` the sum is
 * written to `sum`. Rows are contiguous. */
void omni_norm(const float *x, const float *added, float scale, float *sum, const float *weight, float offset,
               float epsilon, float *out, long rows, long width)
{
    for (long row = 0; row < rows; row++, x += width, out += width) {
        const float *here = x;
        if (added) {
            for (long i = 0; i < width; i++)
                sum[i] = x[i] + scale * added[i];
            here = sum;
            added += width;
            sum += width;
        }
        normalise(here, weight, offset, epsilon, out, width);
    }
}

INLINE void turn(float *x, const float *cosines, const float *sines, long turned, long second_half, long pair_step)
{
    long half = turned / 2;
    if (pair_step)
        for (long i = 0, at = 0; i < half; i++, at += pair_step) {
            float first = x[2 * i], second = x[2 * i + 1];
            x[2 * i] = first * cosines[at] - second * sines[at];
            x[2 * i + 1] = second * cosines[at] + first * sines[at];
        }
    else
        for (long i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = first * cosines[i] - second * sines[i];
            x[i + half] = second * cosines[i + second_half] + first * sines[i + second_half];
        }
}

/* Normalise and rotate heads in place: rows of `heads` heads of `width`, `stride` numbers apart. `cosines` and
 * `sines` have a number for each of the first `turned` columns, rows `table_stride` apart; those of the second half
 * of the columns lie at `second_half`. With `pair_step` columns turn with their neighbours, and pairs take every
 * so manieth number; else each column turns with one of the other half. */
void omni_rotate(float *x, long rows, long stride, long heads, long width, const float *weight, float offset,
                 float epsilon, const float *cosines, const float *sines, long turned, long table_stride,
                 long second_half, long pair_step)
{
    for (long row = 0; row < rows; row++, x += stride)
        for (long head = 0; head < heads; head++) {
            if (weight)
                normalise(x + head * width, weight, offset, epsilon, x + head * width, width);
            if (turned)
                turn(x + head * width, cosines + row * table_stride, sines + row * table_stride, turned,
                     second_half, pair_step);
        }
}

#ifdef __AVX512F__
enum { BLOCK = 16 }; /* numbers of a vector */
#else
enum { BLOCK = 8 };
#endif
enum { LANES = 4, STRIPE = BLOCK * LANES };

typedef float Block __attribute__((vector_size(4 * BLOCK), aligned(4), may_alias)); /* anywhere */
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

INLINE float total_of(Block x)
{
#ifdef __AVX512F__
    Half half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    Half half = x;
#endif
    Quarter quarter =
        __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

INLINE float dot_stripes(const float *left, const float *right, long width)
{
    Block sums[LANES] = {{0}};
    for (long i = 0; i < width; i += STRIPE)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += *(const Block *)(left + i + lane * BLOCK) * *(const Block *)(right + i + lane * BLOCK);
    return total_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* out += the sum of shares[t] * values[t], a stripe of columns after the other. */
INLINE void mix_stripes(const float *shares, const float *values, long value_step, const int32_t *seen, long count,
                        float factor, float *out, long width)
{
    for (long i = 0; i < width; i += STRIPE) {
        Block sums[LANES] = {{0}};
        for (long at = 0; at < count; at++) {
            const float *value = values + seen[at] * value_step + i;
            for (int lane = 0; lane < LANES; lane++)
                sums[lane] += shares[at] * *(const Block *)(value + lane * BLOCK);
        }
        for (int lane = 0; lane < LANES; lane++)
            *(Block *)(out + i + lane * BLOCK) = factor * sums[lane];
    }
}

INLINE void mix(const float *shares, const float *values, long value_step, const int32_t *seen, long count,
                float factor, float *out, long width)
{
    memset(out, 0, sizeof(float) * (size_t)width);
    for (long at = 0; at < count; at++)
        for (long i = 0; i < width; i++)
            out[i] += factor * shares[at] * values[seen[at] * value_step + i];
}

/* Queries of one group of heads over the steps `seen` of their keys and values. */
INLINE void attend_group(const float *query, const float *keys, long key_step, const float *values,
                         long value_step, const int32_t *seen, long count, float *out, float *shares, long group,
                         long width, long value_width, float scale)
{
    int striped = width % STRIPE == 0 && value_width % STRIPE == 0;
    for (long at = 0; at < count; at++)
        for (long g = 0; g < group; g++) {
            const float *key = keys + seen[at] * key_step;
            shares[g * count + at] =
                scale * (striped ? dot_stripes(query + g * width, key, width) : dot(query + g * width, key, width));
        }
    for (long g = 0; g < group; g++, shares += count, out += value_width) {
        float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
        for (long at = 0; at < count; at++)
            most = shares[at] > most ? shares[at] : most;
#pragma omp simd reduction(+ : total)
        for (long at = 0; at < count; at++) {
            shares[at] = exponential(shares[at] - most);
            total += shares[at];
        }
        float factor = total > 0 ? 1.0f / total : 0.0f;
        if (striped)
            mix_stripes(shares, values, value_step, seen, count, factor, out, value_width);
        else
            mix(shares, values, value_step, seen, count, factor, out, value_width);
    }
}

/* Attention of one query a row over all steps held: queries [rows, kv_heads * group, width] and out [rows,
 * kv_heads * group, value_width]; keys and values [rows, kv_heads, steps, ...] by strides; mask [rows, steps],
 * zero at steps that are not seen, or none. Returns 0, or 1 where there is no memory. */
int omni_attend(const float *query, long query_row, const float *keys, long key_row, long key_head,
                long key_step, const float *values, long value_row, long value_head, long value_step,
                const uint8_t *mask, long mask_row, float *out, long rows, long kv_heads, long group, long steps,
                long width, long value_width, float scale)
{
    int failed = 0;
    long tasks = rows * kv_heads;
#pragma omp parallel for schedule(static) if (tasks > 1 && tasks * (group + 3) * steps * width > LEAST_WORK)
    for (long task = 0; task < tasks; task++) {
        long row = task / kv_heads, head = task % kv_heads;
        const float *own_query = query + row * query_row + head * group * width;
        const float *own_keys = keys + row * key_row + head * key_head;
        const float *own_values = values + row * value_row + head * value_head;
        float *own_out = out + (row * kv_heads + head) * group * value_width;
        float *shares = malloc((sizeof(float) * (size_t)group + sizeof(int32_t)) * (size_t)steps);
        if (!shares) {
            failed = 1;
            continue;
        }
        int32_t *seen = (int32_t *)(shares + group * steps);
        long count = 0;
        for (long step = 0; step < steps; step++) /* only what is seen counts, so that padding changes nothing */
            if (!mask || mask[row * mask_row + step])
                seen[count++] = (int32_t)step;
        if (width == 64 && value_width == 64)
            attend_group(own_query, own_keys, key_step, own_values, value_step, seen, count, own_out, shares,
                         group, 64, 64, scale);
        else if (width == 128 && value_width == 128)
            attend_group(own_query, own_keys, key_step, own_values, value_step, seen, count, own_out, shares,
                         group, 128, 128, scale);
        else
            attend_group(own_query, own_keys, key_step, own_values, value_step, seen, count, own_out, shares,
                         group, width, value_width, scale);
        free(shares);
    }
    return failed;
}

/* out = activation(gate) * up: rows of `width`, `stride` numbers apart in gate and up, contiguous in out.
 * Activations: 0 x * sigmoid(x); 1 the Gaussian one by tanh; 2 max(x, 0). */
void omni_gate(const float *gate, const float *up, long stride, float *out, long rows, long width,
               long activation)
{
#pragma omp parallel for schedule(static) if (rows > 1 && rows * width > LEAST_GATES)
    for (long row = 0; row < rows; row++) {
        const float *opening = gate + row * stride, *coming = up + row * stride;
        float *going = out + row * width;
        if (activation == 0) {
#pragma omp simd
            for (long i = 0; i < width; i++)
                going[i] = opening[i] / (1.0f + exponential(-opening[i])) * coming[i];
        } else if (activation == 1) {
#pragma omp simd
            for (long i = 0; i < width; i++) {
                float x = opening[i];
                float inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);
                going[i] = x / (1.0f + exponential(-inner)) * coming[i];
            }
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++)
                going[i] = (opening[i] > 0 ? opening[i] : 0) * coming[i];
        }
    }
}

/* out = x * weight, rows contiguous; returns nonzero where there is no memory. */
typedef int (*Call)(const void *weight, const float *x, long rows, float *out);

typedef struct {
    Call call;
    const void *weight;
    long outputs;
} Product;

/* Without a weight there is no norm. */
typedef struct {
    const float *weight;
    float offset, epsilon;
    long width;
} Norm;

/* What a layer computes: attention is added to the hidden states, then a gated layer. */
typedef struct {
    Norm before_attention, of_queries, of_keys, after_attention, before_gate, after_gate;
    Product entering, leaving, mixing, closing;
    long width, heads, kv_heads, head_width, value_width, turned, pair_step, activation, gate_first, gates;
    float scale, attention_scale, gate_scale;
} Layer;

INLINE const float *normed(const Norm *norm, const float *x, float *out, long rows)
{
    if (!norm->weight)
        return x;
    omni_norm(x, NULL, 0, NULL, norm->weight, norm->offset, norm->epsilon, out, rows, norm->width);
    return out;
}

INLINE void turn_heads(const Layer *layer, const Norm *norm, float *x, long rows, long heads, const float *cosines,
                       const float *sines, long table_stride, long second_half)
{
    long stride = layer->entering.outputs, width = layer->head_width;
    const float *weight = norm->weight;
    if (weight && norm->width != width) { /* all heads as one */
        omni_rotate(x, rows, stride, 1, norm->width, weight, norm->offset, norm->epsilon, NULL, NULL, 0, 0, 0, 0);
        weight = NULL;
    }
    if (weight || layer->turned)
        omni_rotate(x, rows, stride, heads, width, weight, norm->offset, norm->epsilon, cosines, sines,
                    layer->turned, table_stride, second_half, layer->pair_step);
}

/* From hidden states to queries, keys and values side by side, turned. `scratch` has room for the hidden states. */
int omni_layer_begin(const Layer *layer, const float *hidden, long rows, const float *cosines, const float *sines,
                     long table_stride, long second_half, float *scratch, float *projected)
{
    const float *entered = normed(&layer->before_attention, hidden, scratch, rows);
    if (layer->entering.call(layer->entering.weight, entered, rows, projected))
        return 1;
    turn_heads(layer, &layer->of_queries, projected, rows, layer->heads, cosines, sines, table_stride, second_half);
    turn_heads(layer, &layer->of_keys, projected + layer->heads * layer->head_width, rows, layer->kv_heads, cosines,
               sines, table_stride, second_half);
    return 0;
}

/* From turned queries, and the keys and values of all steps, to the layer's output. */
int omni_layer_end(const Layer *layer, const float *hidden, long rows, const float *projected, const float *keys,
                   long key_row, long key_head, long key_step, const float *values, long value_row, long value_head,
                   long value_step, const uint8_t *mask, long mask_row, long steps, float *scratch, float *out)
{
    long size = rows * layer->width;
    float *read = scratch, *came = read + rows * layer->heads * layer->value_width, *middle = came + size;
    float *spare = middle + size, *mixed = spare + size, *gated = mixed + rows * layer->mixing.outputs;
    if (omni_attend(projected, layer->entering.outputs, keys, key_row, key_head, key_step, values, value_row,
                    value_head, value_step, mask, mask_row, read, rows, layer->kv_heads,
                    layer->heads / layer->kv_heads, steps, layer->head_width, layer->value_width, layer->scale) ||
        layer->leaving.call(layer->leaving.weight, read, rows, came))
        return 1;
    const float *added = normed(&layer->after_attention, came, spare, rows);
    for (long i = 0; i < size; i++)
        middle[i] = hidden[i] + layer->attention_scale * added[i];
    const float *entered = normed(&layer->before_gate, middle, spare, rows);
    if (layer->mixing.call(layer->mixing.weight, entered, rows, mixed))
        return 1;
    const float *first = mixed, *second = mixed + layer->gates;
    omni_gate(layer->gate_first ? first : second, layer->gate_first ? second : first, layer->mixing.outputs, gated,
              rows, layer->gates, layer->activation);
    if (layer->closing.call(layer->closing.weight, gated, rows, came))
        return 1;
    added = normed(&layer->after_gate, came, spare, rows);
    for (long i = 0; i < size; i++)
        out[i] = middle[i] + layer->gate_scale * added[i];
    return 0;
}
