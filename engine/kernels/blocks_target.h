/* Products with matrices of quantized blocks, once for each way to multiply bytes: blocks_levels.h includes this file several
 * times with
 *
 *   NAME(x), TARGET, LANES  as in native_target.h
 *   BLOCK_ROWS              rows of a tile
 *   BYTES                   a register of bytes, 4 of each of LANES columns; ZERO, LOAD_CODES, AND, OR, SHIFT_*: of such
 *   OR_BIT_4(codes, p)      codes with bit 4 of each byte from the bits at p
 *   DOT(f, sum, pairs, codes, x, last)  sum += codes . the 4 activations at x, in int32 for each column. `pairs` is for the
 *                           sums of 16 bits that some processors have: they are added up when `last`
 *   STEPS_OF_PAIRS(f)       so many steps before that, lest they overflow
 *   SIGNED_BYTES            whether 8-bit codes are multiplied as signed numbers: then there is no offset to take away
 *   LOAD_FLOAT16, LOAD_INT8, LOAD_UINT8  LANES numbers as floats
 *
 * Rows share the codes in registers. A row's float32 sums run over the groups in order, by the same operations in every
 * tile, and for every way to multiply.
 */

typedef float NAME(vec) __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t NAME(ivec) __attribute__((vector_size(LANES * 4), aligned(4)));
#define VEC NAME(vec)
#define IVEC NAME(ivec)
#define PARTS (PANEL / LANES)

/* The codes of step `s`, for columns [h * LANES, (h + 1) * LANES). */
INLINE TARGET BYTES NAME(codes)(const struct form f, const uint8_t *group, int s, int h) {
  const int at = h * LANES * 4;
  if (f.bits == 8) return LOAD_CODES(group + 64 * s + at);
  BYTES codes = LOAD_CODES(group + 64 * (s / 2) + at);
  if (s % 2) codes = SHIFT_RIGHT(codes, 4);
  codes = AND(codes, 0x0f);
  if (f.bits == 5) codes = OR_BIT_4(codes, group + 256 + 8 * s + at / 8);
  if (f.bits == 6) {
    const BYTES high = LOAD_CODES(group + 256 + 64 * (s / 4) + at);
    const int i = s % 4;
    codes = OR(codes, AND(i == 0 ? SHIFT_LEFT(high, 4) : i == 1 ? SHIFT_LEFT(high, 2) : i == 2 ? high : SHIFT_RIGHT(high, 2), 0x30));
  }
  return codes;
}

/* Steps [from, to) of a group: the sums of code * activation in each column, for each row. */
#define STEPS(from, to)                                                          \
  UNROLL for (int s = from; s < to; s++) {                                       \
    const BYTES codes = NAME(codes)(f, group, s, h);                             \
    const int last = (s + 1 - from) % STEPS_OF_PAIRS(f) == 0;                    \
    UNROLL for (int r = 0; r < rows; r++)                                        \
      DOT(f, sums[r], pairs[r], codes, x[r * groups + g].code + 4 * s, last);    \
  }

INLINE TARGET void NAME(block_tile)(const struct linear_blocks *a, const struct form f, int64_t p, int64_t row,
                                    const int rows) {
  const int64_t groups = a->in / GROUP;
  const struct activation *x = a->x + row * groups;
  const int shift = f.offset == 8 ? 3 : f.offset == 16 ? 4 : f.offset == 32 ? 5 : 7;
  const int has_offset = f.offset && !(f.bits == 8 && SIGNED_BYTES);
  for (int h = 0; h < PARTS; h++) {
    const uint8_t *group = a->packed + p * GROUP_PLACE(f, groups);
    VEC out[BLOCK_ROWS], super_scale = {0}, super_minimum = {0};
    UNROLL for (int r = 0; r < rows; r++) out[r] = (VEC){0};
    for (int64_t g = 0; g < groups; g++, group += GROUP_BYTES(f)) {
      if (f.scales >= SUPER && g % SUPER_GROUPS == 0) {
        super_scale = LOAD_FLOAT16(group + 2 * h * LANES);
        if (f.scales == SUPER) super_minimum = LOAD_FLOAT16(group + 2 * PANEL + 2 * h * LANES);
        group += SUPER_BYTES(f);
      }
      const uint8_t *scales = group + CODE_BYTES(f);
      if (h == 0)
        for (int line = 0; line < GROUP_BYTES(f); line += 64) __builtin_prefetch(group + BLOCK_PREFETCH(rows) + line, 0, 2);
      if (f.scales == SUPER_16) {
        UNROLL for (int half = 0; half < 2; half++) {
          BYTES sums[BLOCK_ROWS], pairs[BLOCK_ROWS];
          UNROLL for (int r = 0; r < rows; r++) sums[r] = pairs[r] = ZERO;
          STEPS(4 * half, 4 * half + 4);
          const VEC scale = super_scale * LOAD_INT8((const int8_t *)scales + PANEL * half + h * LANES);
          UNROLL for (int r = 0; r < rows; r++) {
            const struct activation *each = x + r * groups + g;
            const IVEC sum = (IVEC)sums[r] - ((IVEC){0} + (each->sum[half] << shift));
            out[r] += __builtin_convertvector(sum, VEC) * (scale * each->scale);
          }
        }
        continue;
      }
      BYTES sums[BLOCK_ROWS], pairs[BLOCK_ROWS];
      UNROLL for (int r = 0; r < rows; r++) sums[r] = pairs[r] = ZERO;
      STEPS(0, 8);
      VEC scale, minimum = {0};
      if (f.scales == SUPER) {
        scale = super_scale * LOAD_UINT8(scales + h * LANES);
        minimum = -super_minimum * LOAD_UINT8(scales + PANEL + h * LANES);
      } else {
        scale = LOAD_FLOAT16(scales + 2 * h * LANES);
        if (f.scales == MINIMA) minimum = LOAD_FLOAT16(scales + 2 * PANEL + 2 * h * LANES);
      }
      UNROLL for (int r = 0; r < rows; r++) {
        const struct activation *each = x + r * groups + g;
        IVEC sum = (IVEC)sums[r];
        if (has_offset) sum -= (IVEC){0} + ((each->sum[0] + each->sum[1]) << shift);
        out[r] += __builtin_convertvector(sum, VEC) * (scale * each->scale);
        if (f.scales == MINIMA || f.scales == SUPER) out[r] += minimum * each->scaled_sum;
      }
    }
    const int64_t column = p * PANEL + h * LANES, left = a->columns - column;
    UNROLL for (int r = 0; r < rows; r++) {
      const int64_t place = (row + r) * a->stride + column;
      if (left >= LANES) {
        VEC y = out[r];
        if (a->bias) y += *(const VEC *)(a->bias + column);
        if (a->residual) y += *(const VEC *)(a->residual + place);
        *(VEC *)(a->out + place) = y;
      } else {
        for (int c = 0; c < left; c++) {
          float y = out[r][c];
          if (a->bias) y += a->bias[column + c];
          if (a->residual) y += a->residual[place + c];
          a->out[place + c] = y;
        }
      }
    }
  }
}

#undef STEPS

#define CASE(ROWS)                                \
  case ROWS:                                      \
    NAME(block_tile)(a, f, p, row, ROWS);         \
    break;

/* Panels [begin, end), rows in tiles of as equal a height as can be. */
#define LINEAR(kind_)                                                                                                   \
  TARGET static void NAME(linear_##kind_)(const void *arguments, int64_t begin, int64_t end, int thread) {              \
    (void)thread;                                                                                                       \
    const struct linear_blocks *a = arguments;                                                                          \
    const struct form f = FORM_OF(kind_);                                                                               \
    const int64_t tiles = (a->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;                                                      \
    for (int64_t p = begin; p < end; p++)                                                                               \
      for (int64_t t = 0, row = 0, n; t < tiles; t++, row += n) {                                                       \
        n = a->rows / tiles + (t < a->rows % tiles);                                                                    \
        switch (n) { CASES }                                                                                            \
      }                                                                                                                 \
  }

#if BLOCK_ROWS > 4
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
#define CASES CASE(1) CASE(2) CASE(3) CASE(4)
#endif

LINEAR(Q4_0) LINEAR(Q4_1) LINEAR(Q5_0) LINEAR(Q5_1) LINEAR(Q8_0) LINEAR(Q4_K) LINEAR(Q5_K) LINEAR(Q6_K)

#undef LINEAR
#undef CASES
#undef CASE
#undef PARTS

TARGET static range_function NAME(linear_of)(int64_t kind) {
  switch (kind) {
    case Q4_0: return NAME(linear_Q4_0);
    case Q4_1: return NAME(linear_Q4_1);
    case Q5_0: return NAME(linear_Q5_0);
    case Q5_1: return NAME(linear_Q5_1);
    case Q8_0: return NAME(linear_Q8_0);
    case Q4_K: return NAME(linear_Q4_K);
    case Q5_K: return NAME(linear_Q5_K);
    default: return NAME(linear_Q6_K);
  }
}

/* Rows [begin, end) of activations: each group's largest number becomes 127 or -127. */
TARGET static void NAME(quantize)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct quantize *a = arguments;
  const int64_t groups = a->in / GROUP;
  for (int64_t i = begin * groups; i < end * groups; i++) {
    const float *x = a->x + i * GROUP;
    struct activation *to = a->out + i;
    float most = 0;
    for (int j = 0; j < GROUP; j++) {
      const float size = fabsf(x[j]);
      most = size > most ? size : most;
    }
    const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    int32_t codes[GROUP], sums[2] = {0, 0};
    for (int j = 0; j < GROUP; j++) {
      const float scaled = x[j] * inverse;
      codes[j] = (int32_t)((scaled + magic) - magic);
    }
    for (int j = 0; j < GROUP; j++) to->code[j] = (int8_t)codes[j];
    for (int j = 0; j < 16; j++) sums[0] += codes[j], sums[1] += codes[16 + j];
    to->scale = most / 127.0f;
    to->scaled_sum = to->scale * (float)(sums[0] + sums[1]);
    to->sum[0] = sums[0], to->sum[1] = sums[1];
  }
}

#include "blocks_fit.h"

#undef VEC
#undef IVEC
