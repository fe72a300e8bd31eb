/* The kernels themselves, once for each instruction set: native.c includes this file several times with
 *
 *   NAME(x)   x with the instruction set's suffix
 *   TARGET    the function attribute that turns the instruction set on
 *   LANES     floats in a vector register
 *   MAX_TILE  rows of a tile of the matrix product: as many accumulators as there are registers for
 *   LOAD_BYTES(p)  LANES int8 numbers as floats: compilers make a mess of the vector extension's own conversion
 *
 * The rule that everything here keeps: one row's result is computed by the same operations in the same order however many
 * rows there are and whichever span they belong to. So a verified row equals the decoded row bit for bit. Sums therefore
 * run over k (or over the keys) in one fixed order, tails included, and nothing is split by the number of rows or threads.
 */

typedef float NAME(vec) __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t NAME(ivec) __attribute__((vector_size(LANES * 4), aligned(4)));
#define VEC NAME(vec)
#define IVEC NAME(ivec)
#define PARTS (PANEL / LANES) /* registers across a panel */

INLINE TARGET VEC NAME(load)(const float *p) { return *(const VEC *)p; }
INLINE TARGET void NAME(store)(float *p, VEC v) { *(VEC *)p = v; }
INLINE TARGET VEC NAME(splat)(float x) { return x - (VEC){0}; } /* which is x, -0 too, so that nothing is computed */

INLINE TARGET VEC NAME(select)(IVEC mask, VEC yes, VEC no) { return (VEC)((mask & (IVEC)yes) | (~mask & (IVEC)no)); }

/* exp, after Cephes' expf: within 2 units in the last place over the whole range, 0 below -87.3. */
INLINE TARGET VEC NAME(exp)(VEC x) {
  const VEC low = NAME(splat)(-87.33654f), high = NAME(splat)(88.72f);
  IVEC under = x < low;
  x = NAME(select)(under, low, x);
  x = NAME(select)(x > high, high, x);
  const VEC magic = NAME(splat)(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
  VEC n = (x * 1.44269504088896341f + magic) - magic;
  VEC r = x - n * 0.693359375f - n * -2.12194440e-4f;
  VEC y = NAME(splat)(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  IVEC power = (__builtin_convertvector(n, IVEC) + 127) << 23;
  VEC scaled = y * (VEC)power;
  return NAME(select)(under, NAME(splat)(0.0f), scaled);
}

INLINE TARGET float NAME(sum)(VEC v) {
  float s = 0;
  for (int width = LANES / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  s = v[0];
  return s;
}

/* out[rows][PANEL] = x[rows] . panel (+ bias + residual); the panel is in[k][PANEL]. `next` is what to prefetch, at
 * a pace of so many floats in a step of k. */
#define TILE(ROWS)                                                                                                      \
  INLINE TARGET void NAME(tile##ROWS)(const float *x, int64_t in, const float *panel, const float *bias,                \
                                      const float *residual, float *out, int64_t stride, int columns,                   \
                                      const float *next, const int pace) {                                              \
    VEC acc[ROWS][PARTS];                                                                                               \
    for (int r = 0; r < ROWS; r++)                                                                                      \
      for (int j = 0; j < PARTS; j++) acc[r][j] = (VEC){0};                                                             \
    for (int64_t k = 0; k < in; k++) {                                                                                  \
      VEC b[PARTS];                                                                                                     \
      UNROLL for (int j = 0; j < PARTS; j++) b[j] = NAME(load)(panel + PANEL * k + LANES * j);                          \
      if (next) __builtin_prefetch(next + pace * k, 0, 2);                                                              \
      UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < PARTS; j++) acc[r][j] += x[r * in + k] * b[j];   \
    }                                                                                                                   \
    for (int r = 0; r < ROWS; r++) {                                                                                    \
      float *o = out + r * stride;                                                                                      \
      const float *res = residual ? residual + r * stride : 0;                                                          \
      if (columns == PANEL) {                                                                                           \
        for (int j = 0; j < PARTS; j++) {                                                                               \
          VEC y = acc[r][j];                                                                                            \
          if (bias) y += NAME(load)(bias + LANES * j);                                                                  \
          if (res) y += NAME(load)(res + LANES * j);                                                                    \
          NAME(store)(o + LANES * j, y);                                                                                \
        }                                                                                                               \
      } else {                                                                                                          \
        for (int c = 0; c < columns; c++) {                                                                             \
          float y = acc[r][c / LANES][c % LANES];                                                                       \
          if (bias) y += bias[c];                                                                                       \
          if (res) y += res[c];                                                                                         \
          o[c] = y;                                                                                                     \
        }                                                                                                               \
      }                                                                                                                 \
    }                                                                                                                   \
  }

TILE(1) TILE(2) TILE(3) TILE(4)
#if MAX_TILE > 4
TILE(5) TILE(6)
#endif
#if MAX_TILE > 6
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif

#undef TILE

#define CASE(ROWS)                                                                                \
  case ROWS:                                                                                      \
    if (halves)                                                                                   \
      NAME(tile##ROWS)(x, in, panel, bias, residual, out, stride, columns, next, PANEL / 2);      \
    else                                                                                          \
      NAME(tile##ROWS)(x, in, panel, bias, residual, out, stride, columns, next, PANEL);          \
    break;

TARGET static void NAME(tile)(int rows, const float *x, int64_t in, const float *panel, const float *bias,
                              const float *residual, float *out, int64_t stride, int columns, const float *next,
                              int halves) {
  switch (rows) {
    CASE(1) CASE(2) CASE(3) CASE(4)
#if MAX_TILE > 4
    CASE(5) CASE(6)
#endif
#if MAX_TILE > 6
    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
  }
}

/* Panels [begin, end) of a matrix product. Rows are taken in tiles of as equal a height as can be. While they compute,
 * memory is asked for what comes next; a single row waits for memory anyhow. With one tile that is what it reads itself,
 * some steps later. With more it is the next panel, half of it while the first tile computes and half while the second
 * does: were it fetched in one tile's time, that tile would wait for memory, and then memory for the others. */
TARGET static void NAME(linear)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct linear *a = arguments;
  const int64_t in = a->in, columns = a->columns, tiles = (a->rows + MAX_TILE - 1) / MAX_TILE;
  for (int64_t p = begin; p < end; p++) {
    const float *panel = a->packed + p * in * PANEL;
    const int64_t left = columns - p * PANEL;
    for (int64_t t = 0, row = 0; t < tiles; t++) {
      const int64_t n = a->rows / tiles + (t < a->rows % tiles);
      const float *next = 0;
      if (tiles == 1 && n > 1) next = panel + PANEL * PREFETCH;
      if (tiles > 1 && t < 2) next = panel + PANEL * in + t * (PANEL / 2) * in;
      NAME(tile)((int)n, a->x + row * in, in, panel, a->bias ? a->bias + p * PANEL : 0,
                 a->residual ? a->residual + row * a->stride + p * PANEL : 0, a->out + row * a->stride + p * PANEL, a->stride,
                 left < PANEL ? (int)left : PANEL, next, tiles > 1);
      row += n;
    }
  }
}

#undef CASE

/* The same for weights in int8 with a scale for each column: out = (x . panel) * scale (+ bias + residual). Weights are a
 * quarter of the bytes, so it is the latency of a sum's steps that a few rows wait for: WIDE panels are taken at a time,
 * `apart` bytes from each other. Each sum keeps its order. */
INLINE TARGET VEC NAME(load_bytes)(const int8_t *p) { return LOAD_BYTES(p); }

#define TILE(ROWS, WIDE)                                                                                                \
  INLINE TARGET void NAME(tile_int8_##ROWS##x##WIDE)(const struct linear_int8 *a, int64_t row, int64_t p) {             \
    const int64_t in = a->in, apart = in * PANEL;                                                                       \
    const float *x = a->x + row * in;                                                                                   \
    const int8_t *panel = a->packed + p * apart;                                                                        \
    VEC acc[ROWS][WIDE][PARTS];                                                                                         \
    for (int r = 0; r < ROWS; r++)                                                                                      \
      for (int w = 0; w < WIDE; w++)                                                                                    \
        for (int j = 0; j < PARTS; j++) acc[r][w][j] = (VEC){0};                                                        \
    for (int64_t k = 0; k < in; k++)                                                                                    \
      UNROLL for (int w = 0; w < WIDE; w++) UNROLL for (int j = 0; j < PARTS; j++) {                                    \
        const VEC b = NAME(load_bytes)(panel + w * apart + PANEL * k + LANES * j);                                      \
        UNROLL for (int r = 0; r < ROWS; r++) acc[r][w][j] += x[r * in + k] * b;                                        \
      }                                                                                                                 \
    for (int r = 0; r < ROWS; r++)                                                                                      \
      for (int w = 0; w < WIDE; w++)                                                                                    \
        for (int c = 0; c < PANEL; c++) {                                                                               \
          const int64_t column = (p + w) * PANEL + c, place = (row + r) * a->columns + column;                          \
          if (column >= a->columns) break;                                                                              \
          float y = acc[r][w][c / LANES][c % LANES] * a->scale[column];                                                 \
          if (a->bias) y += a->bias[column];                                                                            \
          if (a->residual) y += a->residual[place];                                                                     \
          a->out[place] = y;                                                                                            \
        }                                                                                                               \
  }

TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(1, 4)
#if LANES == 16 /* and twice as many registers */
TILE(2, 4) TILE(3, 4) TILE(4, 4)
#else
TILE(2, 2)
#endif

#define CASE(ROWS, WIDE)                                  \
  if (height == ROWS && last - p >= WIDE) {               \
    NAME(tile_int8_##ROWS##x##WIDE)(a, row, p);           \
    p += WIDE;                                            \
    continue;                                             \
  }

/* Groups [begin, end) of INT8_WIDE panels. */
TARGET static void NAME(linear_int8)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct linear_int8 *a = arguments;
  const int64_t panels = (a->columns + PANEL - 1) / PANEL;
  for (int64_t group = begin; group < end; group++) {
    const int64_t first = group * INT8_WIDE, last = first + INT8_WIDE < panels ? first + INT8_WIDE : panels;
    for (int64_t row = 0, height; row < a->rows; row += height) {
      height = a->rows - row < 4 ? a->rows - row : 4;
      for (int64_t p = first; p < last;) {
        CASE(1, 4)
#if LANES == 16
        CASE(2, 4) CASE(3, 4) CASE(4, 4)
#else
        CASE(2, 2)
#endif
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1)
      }
    }
  }
}

#undef CASE
#undef TILE

TARGET static void NAME(rms_norm)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct rms_norm *a = arguments;
  for (int64_t i = begin; i < end; i++) {
    const float *source = a->x + (i / a->groups) * a->row_stride + (i % a->groups) * a->group_stride;
    float *target = a->out + i * a->size;
    VEC squares = {0};
    for (int64_t k = 0; k < a->size; k += LANES) {
      const VEC v = NAME(load)(source + k);
      squares += v * v;
    }
    const float scale = 1.0f / sqrtf(NAME(sum)(squares) / (float)a->size + a->eps);
    for (int64_t k = 0; k < a->size; k += LANES)
      NAME(store)(target + k, NAME(load)(source + k) * scale * NAME(load)(a->weight + k));
  }
}

TARGET static void NAME(mask)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct mask *a = arguments;
  const VEC never = NAME(splat)(-INFINITY);
  IVEC bits;
  for (int i = 0; i < LANES; i++) bits[i] = 1 << i;
  for (int64_t r = begin; r < end; r++) {
    float *row = a->logits + r * a->vocab;
    const int32_t *words = a->words + r * a->row_words;
    int64_t token = 0;
    for (; token + 32 <= a->vocab; token += 32) {
      const int32_t word = words[token / 32];
      if (word == -1) continue;
      for (int k = 0; k < 32; k += LANES) {
        const IVEC part = (IVEC){0} + (int32_t)((uint32_t)word >> k);
        NAME(store)(row + token + k, NAME(select)((part & bits) != 0, NAME(load)(row + token + k), never));
      }
    }
    for (; token < a->vocab; token++)
      if (!(((uint32_t)words[token / 32] >> token % 32) & 1)) row[token] = -INFINITY;
  }
}

TARGET static void NAME(silu_mul)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct gated *a = arguments;
  for (int64_t r = begin; r < end; r++) {
    const float *gate = a->gate_up + r * 2 * a->size, *up = gate + a->size;
    for (int64_t k = 0; k < a->size; k += LANES) {
      const VEC g = NAME(load)(gate + k);
      NAME(store)(a->out + r * a->size + k, g / (1.0f + NAME(exp)(-g)) * NAME(load)(up + k));
    }
  }
}

/* (1 + tanh(y)) / 2 is 1 / (1 + exp(-2y)), without the difference that loses a small tanh's digits: so GELU's tanh
 * approximation is g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3))). */
TARGET static void NAME(gelu_mul)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct gated *a = arguments;
  for (int64_t r = begin; r < end; r++) {
    const float *gate = a->gate_up + r * 2 * a->size, *up = gate + a->size;
    for (int64_t k = 0; k < a->size; k += LANES) {
      const VEC g = NAME(load)(gate + k);
      const VEC y = g * (g * g * -7.135481627e-2f - 1.595769122f);
      NAME(store)(a->out + r * a->size + k, g / (1.0f + NAME(exp)(y)) * NAME(load)(up + k));
    }
  }
}

/* The first half of a head's dimensions with the second (Hugging Face's order), in place. */
TARGET static void NAME(rotate)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct rotate *a = arguments;
  const int64_t half = a->dim / 2;
  for (int64_t r = begin; r < end; r++) {
    const float *cosine = a->cos_sin + a->positions[r] * a->dim, *sine = cosine + half;
    for (int64_t h = 0; h < a->heads; h++) {
      float *low = a->x + r * a->row_stride + h * a->dim, *high = low + half;
      for (int64_t k = 0; k < half; k++) {
        const float x = low[k], y = high[k];
        low[k] = x * cosine[k] - y * sine[k];
        high[k] = y * cosine[k] + x * sine[k];
      }
    }
  }
}

#include "attention_target.h"
#include "draw_target.h"

#undef VEC
#undef IVEC
#undef PARTS
