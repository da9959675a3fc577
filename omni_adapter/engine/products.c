/* Products of a weight in 8 bits, or in bfloat16, and rows in float32.
 *
 * The weight [outputs, inputs] lies in tiles of 16 outputs and 64 bytes of each of them: [outputs / 16][bytes / 64]
 * [16 groups][16 outputs][4 bytes], padded with zeros. So it is read from the first byte to the last, by vectors
 * for few rows and by matrix units for many. A row is quantised by itself, and computed in the same order whatever
 * stands beside it, so that rows come out in a batch as they do alone.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    OUTPUTS = 16,       /* of a tile */
    GROUPS = 16,        /* of a tile, of 4 bytes */
    TILE = OUTPUTS * GROUPS * 4,
    ROWS = 8,           /* that vectors take at once */
    HELD_ROWS = 256,    /* that are quantised at once */
    LIMIT = 127,
    MIDDLE = 128,       /* added to weights in 8 bits, as products are of unsigned and signed bytes */
    LEAST_BYTES = 1 << 16, /* of a weight for which a second thread pays */
    LEAST_ROWS = 16,    /* that are quantised by several threads */
    AHEAD = 1024,       /* bytes of a weight that are asked for beforehand */
};

/* A weight in tiles, the scale of each output, and a bias or none. */
typedef struct {
    const uint8_t *weight;
    const float *scale;
    const float *bias;
    long outputs, inputs;
} Weight;

/* Rows in 8 bits, `bytes` apart: what a byte stands for, and MIDDLE times the sum of a row's bytes. */
typedef struct {
    int8_t *values;
    float *scale;
    int32_t *surplus;
    long bytes;
} Rows;

INLINE long tiles_of(long bytes) { return (bytes + 63) / 64; }

/* ---- rows ---- */

static void quantise(const float *x, long inputs, const Rows *rows, long row)
{
    float most = 0, broken = 0;
#pragma omp simd reduction(max : most) reduction(+ : broken)
    for (long i = 0; i < inputs; i++) {
        float size = fabsf(x[i]);
        most = size > most ? size : most;
        broken += 0.0f * size; /* not a number where the row is not finite */
    }
    most = most > 1e-28f ? most : 1e-28f;
    float factor = broken == 0 ? (float)LIMIT / most : 0;
    int8_t *values = rows->values + row * rows->bytes;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < inputs; i++) {
        int32_t whole = (int32_t)rintf(x[i] * factor);
        values[i] = (int8_t)whole;
        sum += whole;
    }
    memset(values + inputs, 0, (size_t)(rows->bytes - inputs));
    rows->scale[row] = broken == 0 ? most / (float)LIMIT : NAN;
    rows->surplus[row] = MIDDLE * sum;
}

/* What 16 sums stand for, written to one row of the result. */
INLINE void finish(const Weight *weight, const Rows *rows, long row, long output, const int32_t *sums, float *out)
{
    long count = weight->outputs - output;
    count = count < OUTPUTS ? count : OUTPUTS;
    float scale = rows->scale[row];
    int32_t surplus = rows->surplus[row];
    for (long i = 0; i < count; i++) {
        float product = (float)(sums[i] - surplus) * weight->scale[output + i] * scale;
        out[i] = weight->bias ? product + weight->bias[output + i] : product;
    }
}

/* ---- few rows: vectors of 16 sums ---- */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef __m512i Sums;
INLINE Sums no_sums(void) { return _mm512_setzero_si512(); }
INLINE Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
INLINE Sums dot4(Sums sums, const uint8_t *weight, const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(weight), _mm512_set1_epi32(four));
}
INLINE void store_sums(int32_t *out, Sums sums) { _mm512_storeu_si512(out, sums); }
#elif defined(__AVX2__)
typedef struct { __m256i half[2]; } Sums;
INLINE Sums no_sums(void) { return (Sums){{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
INLINE Sums add_sums(Sums a, Sums b)
{
    for (int h = 0; h < 2; h++)
        a.half[h] = _mm256_add_epi32(a.half[h], b.half[h]);
    return a;
}
INLINE Sums dot4(Sums sums, const uint8_t *weight, const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    __m256i row = _mm256_set1_epi32(four);
    for (int h = 0; h < 2; h++) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(weight + 32 * h));
#ifdef __AVXVNNI__
        sums.half[h] = _mm256_dpbusd_avx_epi32(sums.half[h], bytes, row);
#else
        /* Bytes in pairs of 16 bits, as sums of products of bytes would be cut off at 16 bits. */
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), _mm256_srai_epi16(row, 8));
        sums.half[h] = _mm256_add_epi32(sums.half[h], _mm256_add_epi32(even, odd));
#endif
    }
    return sums;
}
INLINE void store_sums(int32_t *out, Sums sums) { memcpy(out, &sums, sizeof sums); }
#else
typedef struct { int32_t sum[OUTPUTS]; } Sums;
INLINE Sums no_sums(void) { return (Sums){{0}}; }
INLINE Sums add_sums(Sums a, Sums b)
{
    for (int i = 0; i < OUTPUTS; i++)
        a.sum[i] += b.sum[i];
    return a;
}
INLINE Sums dot4(Sums sums, const uint8_t *weight, const int8_t *x)
{
    for (int i = 0; i < OUTPUTS; i++)
        sums.sum[i] += (weight[4 * i] * x[0] + weight[4 * i + 1] * x[1]) +
                       (weight[4 * i + 2] * x[2] + weight[4 * i + 3] * x[3]);
    return sums;
}
INLINE void store_sums(int32_t *out, Sums sums) { memcpy(out, &sums, sizeof sums); }
#endif

/* `count` rows with 16 outputs. */
INLINE void few(const Weight *weight, const Rows *rows, long first, int count, long block, float *out)
{
    long tiles = tiles_of(weight->inputs);
    const uint8_t *read = weight->weight + block * tiles * TILE;
    const int8_t *values = rows->values + first * rows->bytes;
    Sums sums[ROWS][2];
    for (int row = 0; row < count; row++)
        sums[row][0] = sums[row][1] = no_sums();
    for (long group = 0; group < tiles * GROUPS; group += 4, read += 256)
        for (int turn = 0; turn < 4; turn++) {
            __builtin_prefetch(read + AHEAD + 64 * turn);
            for (int row = 0; row < count; row++)
                sums[row][turn & 1] = dot4(sums[row][turn & 1], read + 64 * turn,
                                           values + row * rows->bytes + 4 * (group + turn));
        }
    for (int row = 0; row < count; row++) {
        int32_t whole[OUTPUTS];
        store_sums(whole, add_sums(sums[row][0], sums[row][1]));
        finish(weight, rows, first + row, block * OUTPUTS, whole,
               out + (first + row) * weight->outputs + block * OUTPUTS);
    }
}

static void some(const Weight *weight, const Rows *rows, long first, long count, long block, float *out)
{
    switch (count) {
    case 1: few(weight, rows, first, 1, block, out); break;
    case 2: few(weight, rows, first, 2, block, out); break;
    case 3: few(weight, rows, first, 3, block, out); break;
    case 4: few(weight, rows, first, 4, block, out); break;
    case 5: few(weight, rows, first, 5, block, out); break;
    case 6: few(weight, rows, first, 6, block, out); break;
    case 7: few(weight, rows, first, 7, block, out); break;
    default: few(weight, rows, first, 8, block, out);
    }
}

/* ---- many rows: 32 rows and 32 outputs at once in matrix units ---- */

#ifdef __AMX_INT8__
enum { SIDE = 16, PERMISSION = 0x1023, TILE_DATA = 18 };

typedef struct {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shapes;

static int has_matrices(void)
{
    static int known; /* 0 not asked yet, 1 no, 2 yes; asking twice is harmless */
    if (!known)
        known = syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) ? 1 : 2;
    return known == 2;
}

/* Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights. */
static void shape_tiles(void)
{
    Shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.bytes[tile] = 64;
        shapes.rows[tile] = SIDE;
    }
    _tile_loadconfig(&shapes);
}

/* 32 rows (of which `count` are kept) with 16 or 32 outputs. */
static void many(const Weight *weight, const Rows *rows, long first, long count, long block, int pair, float *out)
{
    long tiles = tiles_of(weight->inputs);
    const uint8_t *left = weight->weight + block * tiles * TILE, *right = left + pair * tiles * TILE;
    const int8_t *values = rows->values + first * rows->bytes;
    int32_t sums[4][SIDE * OUTPUTS];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long tile = 0; tile < tiles; tile++) {
        _tile_loadd(4, values + 64 * tile, rows->bytes);
        _tile_loadd(6, left + tile * TILE, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, right + tile * TILE, 64);
        _tile_dpbsud(1, 4, 7);
        if (count > SIDE) {
            _tile_loadd(5, values + SIDE * rows->bytes + 64 * tile, rows->bytes);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (long row = 0; row < count; row++)
        for (int side = 0; side <= pair; side++)
            finish(weight, rows, first + row, (block + side) * OUTPUTS,
                   sums[(row >= SIDE) * 2 + side] + (row % SIDE) * OUTPUTS,
                   out + (first + row) * weight->outputs + (block + side) * OUTPUTS);
}
#endif

/* Rows that are held with the outputs of a part of all blocks. */
static void multiply(const Weight *weight, const Rows *rows, long count, long first_block, long last_block,
                     float *out)
{
#ifdef __AMX_INT8__
    if (count > ROWS && has_matrices()) {
        shape_tiles();
        for (long block = first_block; block < last_block; block += 2)
            for (long row = 0; row < count; row += 2 * SIDE)
                many(weight, rows, row, count - row < 2 * SIDE ? count - row : 2 * SIDE, block,
                     block + 1 < last_block, out);
        _tile_release();
        return;
    }
#endif
    for (long block = first_block; block < last_block; block++)
        for (long row = 0; row < count; row += ROWS)
            some(weight, rows, row, count - row < ROWS ? count - row : ROWS, block, out);
}

/* out [rows, outputs] = x [rows, inputs] times the weight. Returns 0, or 1 where there is no memory. */
int omni_product_int8(const Weight *weight, const float *x, long rows, float *out)
{
    long blocks = (weight->outputs + OUTPUTS - 1) / OUTPUTS, bytes = 64 * tiles_of(weight->inputs);
    long most = rows < HELD_ROWS ? rows : HELD_ROWS;
    long held = (most + 31) / 32 * 32; /* matrix units read rows that are not there, too */
    if (most <= ROWS)
        held = most;
    char *memory = malloc((size_t)held * (size_t)(bytes + 8) + 64);
    if (!memory)
        return 1;
    Rows own = {(int8_t *)(memory + (64 - (uintptr_t)memory % 64)), NULL, NULL, bytes};
    own.scale = (float *)(own.values + held * bytes);
    own.surplus = (int32_t *)(own.scale + held);
    for (long start = 0; start < rows; start += HELD_ROWS) {
        long count = rows - start < HELD_ROWS ? rows - start : HELD_ROWS;
        const float *read = x + start * weight->inputs;
        float *written = out + start * weight->outputs;
#pragma omp parallel for schedule(static) if (count >= LEAST_ROWS)
        for (long row = 0; row < count; row++)
            quantise(read + row * weight->inputs, weight->inputs, &own, row);
#pragma omp parallel if (blocks * bytes * OUTPUTS >= LEAST_BYTES)
        {
            long threads = omp_get_num_threads(), thread = omp_get_thread_num();
            multiply(weight, &own, count, blocks * thread / threads, blocks * (thread + 1) / threads, written);
        }
    }
    free(memory);
    return 0;
}

/* Bytes that a weight takes in tiles: `width` is that of a number. */
long omni_tiled_bytes(long outputs, long inputs, long width)
{
    return (outputs + OUTPUTS - 1) / OUTPUTS * tiles_of(inputs * width) * TILE;
}

/* Write some outputs of a weight, from `first` on, a multiple of 16, into their tiles, which are zeros before. */
void omni_tile(const uint8_t *weight, long first, long outputs, long inputs, long width, uint8_t offset,
               uint8_t *tiled)
{
    long bytes = inputs * width, tiles = tiles_of(bytes);
#pragma omp parallel for schedule(static)
    for (long output = 0; output < outputs; output++) {
        uint8_t *block = tiled + (first + output) / OUTPUTS * tiles * TILE + (first + output) % OUTPUTS * 4;
        for (long byte = 0; byte < bytes; byte++)
            block[byte / 4 * 64 + byte % 4] = (uint8_t)(weight[output * bytes + byte] + offset);
    }
}
