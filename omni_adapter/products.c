/* Products of a weight in 8 bits, in bfloat16 or in float32, and rows in float32.
 *
 * The weight [outputs, inputs] lies in tiles of 16 outputs and 64 bytes of each of them:
 * [outputs / 16][bytes / 64][16 groups][16 outputs][4 bytes], padded with zeros. So it is read from the first byte
 * to the last, by vectors for few rows and by matrix units for many. A row is quantised by itself, and computed in
 * the same order whatever stands beside it, so that rows come out in a batch as they do alone.
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
#if defined(__linux__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline)) /* so that registers are dealt out for it alone */

enum {
    OUTPUTS = 16, /* of a tile */
    GROUPS = 16,  /* of a tile, of 4 bytes */
    TILE = OUTPUTS * GROUPS * 4,
#ifdef __AVX512F__
    ROWS = 8,   /* that vectors take at once, so many that their sums stay in registers */
    INT8_ROWS = 8,
    SIDES = 2,  /* sums of an output, of every second input each, so that additions need not wait */
    LANES = 16, /* of a vector in float32 */
#else
    ROWS = 6,
    INT8_ROWS = 4,
    SIDES = 1,
    LANES = 8,
#endif
    VECTORS = OUTPUTS / LANES, /* that hold the sums of a row */
    HELD_ROWS = 256, /* that are quantised at once */
    LIMIT = 127,
    MIDDLE = 128,          /* added to weights in 8 bits, as products are of unsigned and signed bytes */
    LEAST_BYTES = 1 << 16, /* of a weight for which a second thread pays */
    LEAST_ROWS = 16,       /* that are quantised by several threads */
    AHEAD = 1 << 11,       /* bytes of a weight that are asked for beforehand */
};

/* What the numbers of a weight are. */
typedef enum { INT8, BF16, FP32 } Kind;

/* A weight in tiles, the scale of each output if it is in 8 bits, and a bias or none. */
typedef struct {
    const uint8_t *weight;
    const float *scale;
    const float *bias;
    long outputs, inputs;
} Weight;

/* Four numbers of a row in 8 bits that are multiplied once more, see `split`. */
typedef struct {
    int32_t group;
    int8_t values[4];
} Rest;

/* Rows as they are multiplied, `bytes` apart and filled up with zeros: in 8 bits, in bfloat16 for matrix units, or in
 * float32. Those in 8 bits have a scale, MIDDLE times the sum of their bytes, and some groups with a rest. */
typedef struct {
    char *values;
    float *scale;
    int32_t *surplus, *rests;
    Rest *rest; /* room for every group of a row */
    long bytes;
} Rows;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long tiles_of(long bytes) { return (bytes + 63) / 64; }
INLINE long width_of(Kind kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }
INLINE long tiles_of_output(const Weight *weight, Kind kind) { return tiles_of(weight->inputs * width_of(kind)); }

/* ---- rows ---- */

#if defined(__AVX2__) && !defined(__AVXVNNI__) && !(defined(__AVX512VNNI__) && defined(__AVX512BW__))
#define SPLITS
enum { MOST_OF_TWO = 128 }; /* that two neighbours may add up to: 255 * 128 < 2^15 */

/* Products of bytes are added up by twos in 16 bits. Where two neighbours are too large for that, half of their group
 * stays, and the other half is multiplied later, so that all sums are exact. */
static void split(int8_t *values, long bytes, int32_t *count, Rest *rest)
{
    long found = 0;
    for (long i = 0; i < bytes; i += 32) {
        __m256i twos = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i *)(values + i)));
        __m256i over = _mm256_cmpgt_epi16(_mm256_abs_epi16(twos), _mm256_set1_epi16(MOST_OF_TWO));
        uint32_t large = (uint32_t)_mm256_movemask_epi8(over);
        while (large) {
            int group = __builtin_ctz(large) / 4;
            large &= ~(15u << 4 * group);
            int8_t *four = values + i + 4 * group;
            rest[found].group = (int32_t)(i / 4 + group);
            for (int place = 0; place < 4; place++) {
                int8_t half = (int8_t)(four[place] / 2);
                rest[found].values[place] = (int8_t)(four[place] - half);
                four[place] = half;
            }
            found++;
        }
    }
    *count = (int32_t)found;
}
#endif

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
    int8_t *values = (int8_t *)(rows->values + row * rows->bytes);
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < inputs; i++) {
        int32_t whole = (int32_t)rintf(x[i] * factor);
        values[i] = (int8_t)whole;
        sum += whole;
    }
    memset(values + inputs, 0, (size_t)(rows->bytes - inputs));
#ifdef SPLITS
    split(values, rows->bytes, rows->rests + row, rows->rest + row * (rows->bytes / 4));
#endif
    rows->scale[row] = broken == 0 ? most / (float)LIMIT : NAN;
    rows->surplus[row] = MIDDLE * sum;
}

#ifdef HAS_TILES
static void narrow(const float *x, long inputs, const Rows *rows, long row)
{
    uint16_t *values = (uint16_t *)(rows->values + row * rows->bytes);
    for (long i = 0; i < inputs; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        uint32_t even = bits + 0x7fff + (bits >> 16 & 1); /* the nearest, or the even one of two */
        values[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : even >> 16);
    }
    memset(values + inputs, 0, (size_t)(rows->bytes - 2 * inputs));
}
#endif

static void copy(const float *x, long inputs, const Rows *rows, long row)
{
    char *values = rows->values + row * rows->bytes;
    memcpy(values, x, sizeof(float) * (size_t)inputs);
    memset(values + 4 * inputs, 0, (size_t)(rows->bytes - 4 * inputs));
}

/* What 16 sums stand for, written to one row of the result. */
INLINE void finish(const Weight *weight, Kind kind, const Rows *rows, long row, long output, const void *sums,
                   float *out)
{
    long count = least(weight->outputs - output, OUTPUTS);
    out += row * weight->outputs + output;
    if (kind != INT8) {
        const float *products = sums;
        for (long i = 0; i < count; i++)
            out[i] = weight->bias ? products[i] + weight->bias[output + i] : products[i];
        return;
    }
    const int32_t *wholes = sums;
    float scale = rows->scale[row];
    int32_t surplus = rows->surplus[row];
    for (long i = 0; i < count; i++) {
        float product = (float)(wholes[i] - surplus) * weight->scale[output + i] * scale;
        out[i] = weight->bias ? product + weight->bias[output + i] : product;
    }
}

/* ---- few rows: vectors of 16 sums ---- */

/* Compilers would read it from memory again for each row. */
#if defined(__AVX2__) && !defined(__AVX512F__)
#define KEEP_IN_REGISTER(vector) __asm__("" : "+x"(vector))
#else
#define KEEP_IN_REGISTER(vector) (void)(vector)
#endif

/* Sums are of whole numbers, for 16 outputs; `dot4` adds products of 4 bytes of each with those of a row. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { PARTS = 1 };
typedef __m512i Whole;
INLINE Whole no_sums(void) { return _mm512_setzero_si512(); }
INLINE Whole add_sums(Whole a, Whole b) { return _mm512_add_epi32(a, b); }
INLINE Whole load_bytes(const uint8_t *weight) { return _mm512_loadu_si512(weight); }
INLINE Whole spread(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}
INLINE Whole dot4(Whole sums, Whole weight, Whole x) { return _mm512_dpbusd_epi32(sums, weight, x); }
#elif defined(__AVX2__)
enum { PARTS = 2 };
typedef __m256i Whole;
INLINE Whole no_sums(void) { return _mm256_setzero_si256(); }
INLINE Whole add_sums(Whole a, Whole b) { return _mm256_add_epi32(a, b); }
INLINE Whole load_bytes(const uint8_t *weight) { return _mm256_loadu_si256((const __m256i *)weight); }
INLINE Whole spread(const int8_t *x) { return _mm256_castps_si256(_mm256_broadcast_ss((const float *)x)); }
INLINE Whole dot4(Whole sums, Whole weight, Whole x)
{
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sums, weight, x);
#else
    Whole twos = _mm256_maddubs_epi16(weight, x);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
#endif
}
#else
enum { PARTS = 16 };
typedef int32_t Whole;
INLINE Whole no_sums(void) { return 0; }
INLINE Whole add_sums(Whole a, Whole b) { return a + b; }
INLINE Whole load_bytes(const uint8_t *weight)
{
    Whole four;
    memcpy(&four, weight, 4);
    return four;
}
INLINE Whole spread(const int8_t *x) { return load_bytes((const uint8_t *)x); }
INLINE Whole dot4(Whole sums, Whole weight, Whole x)
{
    for (int place = 0; place < 32; place += 8)
        sums += (uint8_t)(weight >> place) * (int8_t)(x >> place);
    return sums;
}
#endif

/* `count` rows in 8 bits with 16 outputs, or 32 as a pair. */
INLINE void few_int8(const Weight *weight, const Rows *rows, long first, int count, long block, int pair, float *out)
{
    long groups = tiles_of_output(weight, INT8) * GROUPS, size = groups * 64;
    const uint8_t *read = weight->weight + block * size;
    const int8_t *values = (const int8_t *)(rows->values + first * rows->bytes);
    Whole sums[2][INT8_ROWS][SIDES][PARTS];
#pragma GCC unroll 2
    for (int place = 0; place <= pair; place++)
#pragma GCC unroll 8
        for (int row = 0; row < count; row++)
#pragma GCC unroll 2
            for (int side = 0; side < SIDES; side++)
#pragma GCC unroll 2
                for (int part = 0; part < PARTS; part++)
                    sums[place][row][side][part] = no_sums();
    for (long group = 0; group < groups; group += SIDES)
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++)
#pragma GCC unroll 2
            for (int place = 0; place <= pair; place++) {
                const uint8_t *line = read + place * size + 64 * (group + side);
                __builtin_prefetch(line + AHEAD, 0, 2);
                Whole bytes[PARTS];
#pragma GCC unroll 2
                for (int part = 0; part < PARTS; part++) {
                    bytes[part] = load_bytes(line + 64 / PARTS * part);
                    KEEP_IN_REGISTER(bytes[part]);
                }
#pragma GCC unroll 8
                for (int row = 0; row < count; row++) {
                    Whole x = spread(values + row * rows->bytes + 4 * (group + side));
#pragma GCC unroll 2
                    for (int part = 0; part < PARTS; part++)
                        sums[place][row][side][part] = dot4(sums[place][row][side][part], bytes[part], x);
                }
            }
    Whole sum[2][INT8_ROWS][PARTS]; /* in memory, which sums in the making should not be */
#pragma GCC unroll 2
    for (int place = 0; place <= pair; place++)
#pragma GCC unroll 8
        for (int row = 0; row < count; row++)
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part++) {
                Whole *sides = &sums[place][row][0][part];
                sum[place][row][part] = SIDES == 2 ? add_sums(sides[0], sides[PARTS * (SIDES - 1)]) : sides[0];
            }
    for (int place = 0; place <= pair; place++)
        for (int row = 0; row < count; row++) {
#ifdef SPLITS
            const Rest *rest = rows->rest + (first + row) * (rows->bytes / 4), *end = rest + rows->rests[first + row];
            for (; rest < end; rest++)
                for (int part = 0; part < PARTS; part++) {
                    const uint8_t *line = read + place * size + 64 * rest->group + 64 / PARTS * part;
                    sum[place][row][part] = dot4(sum[place][row][part], load_bytes(line), spread(rest->values));
                }
#endif
            int32_t whole[OUTPUTS];
            memcpy(whole, sum[place][row], sizeof whole);
            finish(weight, INT8, rows, first + row, (block + place) * OUTPUTS, whole, out);
        }
}

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* 16 outputs of an input, the first or second of a pair, as numbers in bfloat16 lie side by side: these are the upper
 * halves of numbers in float32. */
INLINE void load_numbers(Kind kind, const uint8_t *pair, int side, Floats numbers[VECTORS])
{
#pragma GCC unroll 2
    for (int vector = 0; vector < VECTORS; vector++) {
        const uint8_t *here = pair + 4 * LANES * vector;
        Words both = *(const Words *)here;
        if (kind == FP32)
            numbers[vector] = *(const Floats *)(here + 64 * side);
        else if (side)
            numbers[vector] = (Floats)(both & 0xffff0000u);
        else
            numbers[vector] = (Floats)(both << 16);
        KEEP_IN_REGISTER(numbers[vector]);
    }
}

/* `count` rows in float32 with 16 outputs in float32 or in bfloat16. */
INLINE void few_floats(const Weight *weight, Kind kind, const Rows *rows, long first, int count, long block,
                       float *out)
{
    long tiles = tiles_of_output(weight, kind), step = kind == BF16 ? 64 : 128;
    const uint8_t *read = weight->weight + block * tiles * TILE, *end = read + tiles * TILE;
    const float *values = (const float *)(rows->values + first * rows->bytes);
    long stride = rows->bytes / 4;
    Floats sums[ROWS][SIDES][VECTORS];
    for (int row = 0; row < count; row++)
        for (int side = 0; side < SIDES; side++)
            for (int vector = 0; vector < VECTORS; vector++)
                sums[row][side][vector] = (Floats){0};
    for (; read < end; read += step, values += 2) {
        for (int line = 0; line < step; line += 64)
            __builtin_prefetch(read + AHEAD + line, 0, 2);
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++) {
            Floats numbers[VECTORS];
            load_numbers(kind, read, side, numbers);
#pragma GCC unroll 8
            for (int row = 0; row < count; row++)
#pragma GCC unroll 2
                for (int vector = 0; vector < VECTORS; vector++)
                    sums[row][side % SIDES][vector] += numbers[vector] * values[row * stride + side];
        }
    }
    for (int row = 0; row < count; row++) {
        Floats sum[VECTORS];
        for (int vector = 0; vector < VECTORS; vector++) {
            sum[vector] = sums[row][0][vector];
            if (SIDES == 2)
                sum[vector] += sums[row][SIDES - 1][vector];
        }
        finish(weight, kind, rows, first + row, block * OUTPUTS, sum, out);
    }
}

INLINE long rows_at_once(Kind kind) { return kind == INT8 ? INT8_ROWS : ROWS; }

/* Compiled once for each number of rows. */
INLINE void some_floats(const Weight *weight, Kind kind, const Rows *rows, long first, long count, long block,
                        float *out)
{
    switch (count) {
    case 1: few_floats(weight, kind, rows, first, 1, block, out); break;
    case 2: few_floats(weight, kind, rows, first, 2, block, out); break;
    case 3: few_floats(weight, kind, rows, first, 3, block, out); break;
    case 4: few_floats(weight, kind, rows, first, 4, block, out); break;
    case 5: few_floats(weight, kind, rows, first, 5, block, out); break;
    case 6: few_floats(weight, kind, rows, first, 6, block, out); break;
#ifdef __AVX512F__
    case 7: few_floats(weight, kind, rows, first, 7, block, out); break;
    default: few_floats(weight, kind, rows, first, 8, block, out);
#endif
    }
}

APART void some_fp32(const Weight *weight, const Rows *rows, long first, long count, long block, float *out)
{
    some_floats(weight, FP32, rows, first, count, block, out);
}

APART void some_bf16(const Weight *weight, const Rows *rows, long first, long count, long block, float *out)
{
    some_floats(weight, BF16, rows, first, count, block, out);
}

APART void some_int8(const Weight *weight, const Rows *rows, long first, long count, long block, float *out)
{
    switch (count) {
    case 1: few_int8(weight, rows, first, 1, block, 0, out); break;
    case 2: few_int8(weight, rows, first, 2, block, 0, out); break;
    case 3: few_int8(weight, rows, first, 3, block, 0, out); break;
    case 4: few_int8(weight, rows, first, 4, block, 0, out); break;
#ifdef __AVX512F__
    case 5: few_int8(weight, rows, first, 5, block, 0, out); break;
    case 6: few_int8(weight, rows, first, 6, block, 0, out); break;
    case 7: few_int8(weight, rows, first, 7, block, 0, out); break;
    default: few_int8(weight, rows, first, 8, block, 0, out);
#endif
    }
}

INLINE void some(const Weight *weight, Kind kind, const Rows *rows, long first, long count, long block, float *out)
{
    switch (kind) {
    case INT8: some_int8(weight, rows, first, count, block, out); break;
    case BF16: some_bf16(weight, rows, first, count, block, out); break;
    default: some_fp32(weight, rows, first, count, block, out);
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
#define PAIRS /* of 16 outputs for one or two rows, where these have a single sum an output (SIDES) */
#endif

#ifdef PAIRS
/* `count` rows with 32 outputs: each sum is that of 16, and twice as many of them go on while one waits. */
INLINE void pair_of_floats(const Weight *weight, Kind kind, const Rows *rows, int count, long block, float *out)
{
    long size = tiles_of_output(weight, kind) * TILE, step = kind == BF16 ? 64 : 128;
    const uint8_t *read = weight->weight + block * size, *end = read + size;
    const float *values = (const float *)rows->values;
    long stride = rows->bytes / 4;
    Floats sums[2][2][VECTORS] = {0};
    for (; read < end; read += step, values += 2)
#pragma GCC unroll 2
        for (int place = 0; place < 2; place++) {
            const uint8_t *here = read + place * size;
            for (int line = 0; line < step; line += 64)
                __builtin_prefetch(here + AHEAD + line, 0, 2);
#pragma GCC unroll 2
            for (int side = 0; side < 2; side++) {
                Floats numbers[VECTORS];
                load_numbers(kind, here, side, numbers);
#pragma GCC unroll 2
                for (int row = 0; row < count; row++)
#pragma GCC unroll 2
                    for (int vector = 0; vector < VECTORS; vector++)
                        sums[place][row][vector] += numbers[vector] * values[row * stride + side];
            }
        }
    for (int place = 0; place < 2; place++)
        for (int row = 0; row < count; row++)
            finish(weight, kind, rows, row, (block + place) * OUTPUTS, sums[place][row], out);
}

INLINE void pair(const Weight *weight, Kind kind, const Rows *rows, int count, long block, float *out)
{
    switch (kind) {
    case INT8: few_int8(weight, rows, 0, count, block, 1, out); break;
    case BF16: pair_of_floats(weight, BF16, rows, count, block, out); break;
    default: pair_of_floats(weight, FP32, rows, count, block, out);
    }
}
#endif

/* One or two rows with as many outputs as go by pairs; returns the first block of the rest. */
APART long in_pairs(const Weight *weight, Kind kind, const Rows *rows, long count, long first, long last, float *out)
{
#ifdef PAIRS
    for (; count <= 2 && first + 1 < last; first += 2)
        if (count == 1)
            pair(weight, kind, rows, 1, first, out);
        else
            pair(weight, kind, rows, 2, first, out);
#else
    (void)weight, (void)kind, (void)rows, (void)count, (void)last, (void)out;
#endif
    return first;
}

/* ---- matrix units: 32 rows and 32 outputs at once ---- */

#ifdef HAS_TILES
enum { SIDE = 16, PERMISSION = 0x1023, TILE_DATA = 18 };

typedef struct {
    uint8_t palette, start;
    uint8_t reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shapes;

static int has_tiles(void)
{
    static int known; /* 0 not asked yet, 1 no, 2 yes; asking twice is harmless */
    if (!known)
        known = syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) ? 1 : 2;
    return known == 2;
}

/* Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights. */
static void shape_tiles(long rows)
{
    Shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.bytes[tile] = 64;
        shapes.rows[tile] = tile < 6 && rows < SIDE ? (uint8_t)rows : SIDE;
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* compilers do not know that all of it is read */
    _tile_loadconfig(&shapes);
}

INLINE void ask_for(const uint8_t *tile)
{
    for (int group = 0; group < GROUPS; group++)
        __builtin_prefetch(tile + AHEAD + 64 * group, 0, 2);
}

/* 32 rows, of which `count` are kept, with 16 or 32 outputs. */
INLINE void many(const Weight *weight, Kind kind, const Rows *rows, long first, long count, long block,
                 int pair, float *out)
{
    long tiles = tiles_of_output(weight, kind);
    const uint8_t *left = weight->weight + block * tiles * TILE, *right = left + pair * tiles * TILE;
    const char *values = rows->values + first * rows->bytes;
    int32_t sums[4][SIDE * OUTPUTS];
    __asm__ volatile("" : : "r"(values), "r"(left) : "memory"); /* nor that tiles are */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#define DOT(sums, rows, weights)                            \
    do {                                                    \
        if (kind == BF16)                                   \
            _tile_dpbf16ps(sums, rows, weights);            \
        else                                                \
            _tile_dpbsud(sums, rows, weights);              \
    } while (0)
    for (long tile = 0; tile < tiles; tile++) {
        ask_for(left + tile * TILE);
        ask_for(right + tile * TILE);
        _tile_loadd(4, values + 64 * tile, rows->bytes);
        _tile_loadd(6, left + tile * TILE, 64);
        DOT(0, 4, 6);
        _tile_loadd(7, right + tile * TILE, 64);
        DOT(1, 4, 7);
        if (count > SIDE) {
            _tile_loadd(5, values + SIDE * rows->bytes + 64 * tile, rows->bytes);
            DOT(2, 5, 6);
            DOT(3, 5, 7);
        }
    }
#undef DOT
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (long row = 0; row < count; row++)
        for (int side = 0; side <= pair; side++)
            finish(weight, kind, rows, first + row, (block + side) * OUTPUTS,
                   sums[(row >= SIDE) * 2 + side] + (row % SIDE) * OUTPUTS, out);
}
#endif

/* Whether a product goes through matrix units. In bfloat16 all do: their sums are not those of vectors. */
INLINE int takes_tiles(Kind kind, long count)
{
#ifdef HAS_TILES
    return (kind == BF16 || (kind == INT8 && count > INT8_ROWS)) && has_tiles();
#else
    (void)kind, (void)count;
    return 0;
#endif
}

/* Rows that are held with the outputs of a part of all blocks. */
INLINE void multiply(const Weight *weight, Kind kind, const Rows *rows, long count, long first, long last,
                     float *out)
{
#ifdef HAS_TILES
    if (takes_tiles(kind, count)) {
        shape_tiles(count);
        for (long block = first; block < last; block += 2)
            for (long row = 0; row < count; row += 2 * SIDE)
                many(weight, kind, rows, row, least(count - row, 2 * SIDE), block, block + 1 < last, out);
        _tile_release();
        return;
    }
#endif
    for (long block = in_pairs(weight, kind, rows, count, first, last, out); block < last; block++)
        for (long row = 0; row < count; row += rows_at_once(kind))
            some(weight, kind, rows, row, least(count - row, rows_at_once(kind)), block, out);
}

INLINE void prepare(Kind kind, const float *x, long inputs, const Rows *rows, long row)
{
#ifdef HAS_TILES
    if (kind == BF16 && has_tiles()) {
        narrow(x, inputs, rows, row);
        return;
    }
#endif
    if (kind == INT8)
        quantise(x, inputs, rows, row);
    else
        copy(x, inputs, rows, row);
}

INLINE int product(const Weight *weight, Kind kind, const float *x, long rows, float *out)
{
    long tiles = tiles_of_output(weight, kind), blocks = (weight->outputs + OUTPUTS - 1) / OUTPUTS;
    long most = least(rows, HELD_ROWS);
    int in_tiles = takes_tiles(kind, most);
    long held = most;
    if (in_tiles && most > OUTPUTS)
        held = (most + 31) / 32 * 32; /* tiles read rows that are not kept, too */
    long bytes = 64 * tiles * (in_tiles || kind == INT8 ? 1 : 4 / width_of(kind));
    long rest_bytes = 0;
#ifdef SPLITS
    rest_bytes = kind == INT8 ? bytes / 4 * (long)sizeof(Rest) : 0;
#endif
    char *memory = malloc((size_t)held * (size_t)(bytes + rest_bytes + 12) + 64);
    if (!memory)
        return 1;
    Rows own = {.values = memory + (64 - (uintptr_t)memory % 64), .bytes = bytes};
    own.rest = (Rest *)(own.values + held * bytes);
    own.scale = (float *)(own.values + held * (bytes + rest_bytes));
    own.surplus = (int32_t *)(own.scale + held);
    own.rests = own.surplus + held;
    for (long start = 0; start < rows; start += HELD_ROWS) {
        long count = least(rows - start, HELD_ROWS);
        const float *read = x + start * weight->inputs;
        float *written = out + start * weight->outputs;
#pragma omp parallel for schedule(static) if (count >= LEAST_ROWS)
        for (long row = 0; row < count; row++)
            prepare(kind, read + row * weight->inputs, weight->inputs, &own, row);
#pragma omp parallel if (blocks * tiles * TILE >= LEAST_BYTES)
        {
            long threads = omp_get_num_threads(), thread = omp_get_thread_num();
            multiply(weight, kind, &own, count, blocks * thread / threads, blocks * (thread + 1) / threads,
                     written);
        }
    }
    free(memory);
    return 0;
}

/* out [rows, outputs] = x [rows, inputs] times a weight in 8 bits. Returns 0, or 1 where there is no memory. */
int omni_product_int8(const Weight *weight, const float *x, long rows, float *out)
{
    return product(weight, INT8, x, rows, out);
}

/* The same with a weight in bfloat16. */
int omni_product_bf16(const Weight *weight, const float *x, long rows, float *out)
{
    return product(weight, BF16, x, rows, out);
}

/* The same with a weight in float32. */
int omni_product_fp32(const Weight *weight, const float *x, long rows, float *out)
{
    return product(weight, FP32, x, rows, out);
}

/* Bytes that a weight takes in tiles: `width` is that of a number. */
long omni_tiled_bytes(long outputs, long inputs, long width)
{
    return (outputs + OUTPUTS - 1) / OUTPUTS * tiles_of(inputs * width) * TILE;
}

/* Write some outputs of a weight, from `first` on, a multiple of 16, into their
 * tiles, which are zeros before. */
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
