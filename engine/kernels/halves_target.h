/* Products with matrices of 16-bit floats, once for each instruction set: halves_levels.h includes this file several times
 * with NAME(x), TARGET, LANES and MAX_TILE as in native_target.h, and
 *
 *   LOAD_FLOAT16(p), LOAD_BFLOAT16(p)  LANES numbers as floats
 *
 * A number is widened in registers, exactly, and every sum is that of native_target.h's tiles: so a row has the bits of the
 * same matrix in float32, for half of the bytes. A few rows wait for the latency of their sums rather than for memory, and
 * so take WIDE panels at a time, as int8 does.
 */

typedef float NAME(vec) __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t NAME(ivec) __attribute__((vector_size(LANES * 4), aligned(4)));
#define VEC NAME(vec)
#define IVEC NAME(ivec)
#define PARTS (PANEL / LANES)

INLINE TARGET void NAME(tile)(const struct linear *a, int64_t row, int64_t p, const int rows, const int wide, const int kind,
                              const uint16_t *next, const int pace) {
  const int64_t in = a->in, apart = in * PANEL;
  const float *x = a->x + row * in;
  const uint16_t *panel = (const uint16_t *)a->packed + p * apart;
  VEC acc[MAX_TILE][4][PARTS];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int w = 0; w < wide; w++)
      UNROLL for (int j = 0; j < PARTS; j++) acc[r][w][j] = (VEC){0};
  for (int64_t k = 0; k < in; k++) {
    if (next) __builtin_prefetch(next + pace * k, 0, 2);
    UNROLL for (int w = 0; w < wide; w++) {
      VEC b[PARTS];
      UNROLL for (int j = 0; j < PARTS; j++) {
        const uint16_t *at = panel + w * apart + PANEL * k + LANES * j;
        b[j] = kind == FLOAT16 ? LOAD_FLOAT16(at) : LOAD_BFLOAT16(at);
      }
      UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < PARTS; j++) acc[r][w][j] += x[r * in + k] * b[j];
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int w = 0; w < wide; w++) {
      const int64_t column = (p + w) * PANEL, place = (row + r) * a->stride + column;
      if (a->columns - column >= PANEL) {
        UNROLL for (int j = 0; j < PARTS; j++) {
          VEC y = acc[r][w][j];
          if (a->bias) y += *(const VEC *)(a->bias + column + LANES * j);
          if (a->residual) y += *(const VEC *)(a->residual + place + LANES * j);
          *(VEC *)(a->out + place + LANES * j) = y;
        }
        continue;
      }
      for (int c = 0; c < a->columns - column; c++) {
        float y = acc[r][w][c / LANES][c % LANES];
        if (a->bias) y += a->bias[column + c];
        if (a->residual) y += a->residual[place + c];
        a->out[place + c] = y;
      }
    }
}

#define CASE(ROWS)                                            \
  case ROWS:                                                  \
    NAME(tile)(a, row, p, ROWS, 1, kind, next, pace);         \
    break;
#define WIDE(ROWS, PANELS)                                    \
  if (a->rows == ROWS && end - p >= PANELS) {                 \
    NAME(tile)(a, 0, p, ROWS, PANELS, kind, 0, 0);            \
    p += PANELS;                                              \
    continue;                                                 \
  }

/* Panels [begin, end), as `linear` of native_target.h takes them. */
INLINE TARGET void NAME(panels)(const struct linear *a, int64_t begin, int64_t end, const int kind) {
  const int64_t in = a->in, tiles = (a->rows + MAX_TILE - 1) / MAX_TILE;
  for (int64_t p = begin; p < end;) {
    WIDE(1, 4) WIDE(1, 2)
#if LANES == 16
    WIDE(2, 4) WIDE(3, 4) WIDE(4, 4) WIDE(5, 2) WIDE(6, 2)
#else
    WIDE(2, 2)
#endif
    const uint16_t *panel = (const uint16_t *)a->packed + p * in * PANEL;
    for (int64_t t = 0, row = 0, n; t < tiles; t++, row += n) {
      n = a->rows / tiles + (t < a->rows % tiles);
      const int pace = tiles == 1 ? PANEL : PANEL / 2;
      const uint16_t *next = 0;
      if (tiles == 1 && n > 1) next = panel + PANEL * PREFETCH;
      if (tiles > 1 && t < 2) next = panel + PANEL * in + t * pace * in;
      switch (n) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if MAX_TILE > 4
        CASE(5) CASE(6)
#endif
#if MAX_TILE > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
      }
    }
    p++;
  }
}

#undef CASE
#undef WIDE
#undef PARTS

TARGET static void NAME(linear_FLOAT16)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  NAME(panels)(arguments, begin, end, FLOAT16);
}

TARGET static void NAME(linear_BFLOAT16)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  NAME(panels)(arguments, begin, end, BFLOAT16);
}

#undef VEC
#undef IVEC

/* What halves_levels.h has defined for the level. */
#undef SUFFIX
#undef TARGET
#undef LANES
#undef MAX_TILE
#undef LOAD_FLOAT16
#undef LOAD_BFLOAT16
