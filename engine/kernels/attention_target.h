/* Attention over the paged cache, once for each instruction set (see native_target.h, which includes this file).
 *
 * One order of operations for every row. The keys of a sequence are taken in splits of SPLIT, counted from its first. Of
 * a split a row has a part: the scores, each a sum over the dimensions in order; their maximum; the weights, powers of 2
 * of the differences from it; the weights' sum, lane by lane; and the values' sum, weighted, in the keys' order. A row's
 * result is its parts, folded in the splits' order. What a row may not see weighs exactly 0, which leaves its sums as they
 * are, and a split of which it sees nothing is left out. So it matters neither which rows share a tile, nor whether one
 * thread folds a row's splits as it goes or several compute them beside each other.
 *
 * Rows by keys are tiles of registers: of TALL rows where there are as many, so that what is loaded is used that often.
 */

#if LANES == 16
#define MAX(a, b) ((VEC)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define LOAD_HALVES(p) ((VEC)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define TALL 12      /* rows of a tile of scores, by 2 registers of keys */
#define TALL_MIX 6   /* rows of a tile of results, by TALL_PARTS registers of a value */
#define TALL_PARTS 4
#define FEW_PARTS 4  /* registers of a value where there are at most 3 rows */
#elif LANES == 8
#define MAX(a, b) ((VEC)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define LOAD_HALVES(p) ((VEC)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define TALL 6
#define TALL_MIX 6
#define TALL_PARTS 2
#define FEW_PARTS 4
#else
#define MAX(a, b) NAME(select)((a) > (b), a, b)
#define LOAD_HALVES(p) \
  ((VEC)((IVEC){((const uint16_t *)(p))[0], ((const uint16_t *)(p))[1], ((const uint16_t *)(p))[2], ((const uint16_t *)(p))[3]} << 16))
#define TALL 4
#define TALL_MIX 4
#define TALL_PARTS 2
#define FEW_PARTS 4
#endif

#define NOINLINE __attribute__((noinline))

/* 2^x for x <= 0, after Cephes' exp2f: within 2 units in the last place, and 0 below -125. */
INLINE TARGET VEC NAME(decay)(VEC x) {
  const VEC low = NAME(splat)(-125.0f), magic = NAME(splat)(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
  const IVEC under = x < low;
  const VEC bounded = MAX(x, low), shifted = bounded + magic, r = bounded - (shifted - magic);
  VEC y = NAME(splat)(1.535336188319500e-4f);
  y = y * r + 1.339887440266574e-3f;
  y = y * r + 9.618437357674640e-3f;
  y = y * r + 5.550332471162809e-2f;
  y = y * r + 2.402264791363012e-1f;
  y = y * r + 6.931472028550421e-1f;
  y = y * r + 1.0f;
  return (VEC)(~under & ((IVEC)y + ((IVEC)shifted << 23)));
}

/* LANES numbers of a cache in this form, as floats. */
INLINE TARGET VEC NAME(load_form)(const int form, const void *numbers, int64_t index) {
  if (form == INT8) return NAME(load_bytes)((const int8_t *)numbers + index);
  if (form == BF16) return LOAD_HALVES((const uint16_t *)numbers + index);
  return NAME(load)((const float *)numbers + index);
}

/* scores[ROWS][SPLIT] of WIDE registers of keys, from number `first` of the split on; query is [dim][ROWS]. */
INLINE TARGET void NAME(score)(const int rows, const int wide, const int form, const float *query, int64_t dim,
                               const struct split *s, int64_t first, float *scores) {
  const int per = KEYS / LANES;
  const char *keys[4];
  VEC acc[TALL][4];
  UNROLL for (int w = 0; w < wide; w++) {
    keys[w] = (const char *)s->keys[(first + w) / per] + (first + w) % per * LANES * FORM_SIZE(form);
    UNROLL for (int r = 0; r < rows; r++) acc[r][w] = (VEC){0};
  }
  const int64_t stride = s->key_stride;
  for (int64_t k = 0; k < dim; k++) {
    VEC column[4];
    UNROLL for (int w = 0; w < wide; w++) column[w] = NAME(load_form)(form, keys[w], k * stride);
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int w = 0; w < wide; w++) acc[r][w] += query[k * rows + r] * column[w];
    }
  }
  UNROLL for (int w = 0; w < wide; w++) {
    if (s->scaled) {
      const VEC scale = NAME(load)(s->key_scales[(first + w) / per] + (first + w) % per * LANES);
      UNROLL for (int r = 0; r < rows; r++) acc[r][w] *= scale;
    }
    UNROLL for (int r = 0; r < rows; r++) NAME(store)(scores + r * SPLIT + (first + w) * LANES, acc[r][w]);
  }
}

#define SCORES(ROWS, WIDE, FORM)                                                                                         \
  TARGET static NOINLINE void NAME(scores_##ROWS##_##FORM)(const float *query, int64_t dim, const struct split *s,       \
                                                           float *scores) {                                              \
    const int64_t first = s->from / LANES, last = (s->to + LANES - 1) / LANES;                                           \
    int64_t i = first;                                                                                                   \
    for (; i + WIDE <= last; i += WIDE) NAME(score)(ROWS, WIDE, FORM, query, dim, s, i, scores);                         \
    for (; i < last; i++) NAME(score)(ROWS, 1, FORM, query, dim, s, i, scores);                                          \
  }

/* part[rows][PART] = the sums of weights[rows][SPLIT] times `parts` registers of the values, from dimension d on. */
INLINE TARGET void NAME(mix)(const int rows, const int parts, const int form, const float *weights, const struct split *s,
                             int64_t d, float *part, int64_t part_size) {
  VEC acc[TALL_MIX][FEW_PARTS];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < parts; p++) acc[r][p] = (VEC){0};
  const int64_t stride = s->value_stride * FORM_SIZE(form);
  for (int64_t j = s->from / KEYS * KEYS; j < s->to;) {
    const int64_t end = j + KEYS < s->to ? j + KEYS : s->to;
    const char *value = (const char *)s->values[j / KEYS] + d * FORM_SIZE(form);
    for (; j < end; j++, value += stride) {
      VEC v[FEW_PARTS];
      UNROLL for (int p = 0; p < parts; p++) v[p] = NAME(load_form)(form, value, p * LANES);
      UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < parts; p++) acc[r][p] += weights[r * SPLIT + j] * v[p];
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int p = 0; p < parts; p++) NAME(store)(part + r * part_size + d + p * LANES, acc[r][p]);
}

#define MIXES(ROWS, PARTS_AT_ONCE, FORM)                                                                                 \
  TARGET static NOINLINE void NAME(mixes_##ROWS##_##FORM)(const float *weights, int64_t dim, const struct split *s,      \
                                                          float *part, int64_t part_size) {                              \
    int64_t d = 0;                                                                                                       \
    for (; d + PARTS_AT_ONCE * LANES <= dim; d += PARTS_AT_ONCE * LANES)                                                 \
      NAME(mix)(ROWS, PARTS_AT_ONCE, FORM, weights, s, d, part, part_size);                                              \
    for (; d < dim; d += LANES) NAME(mix)(ROWS, 1, FORM, weights, s, d, part, part_size);                                \
  }

#define FEW_ROWS(FORM)                                    \
  SCORES(1, 4, FORM) SCORES(2, 4, FORM) SCORES(3, 4, FORM) \
  MIXES(1, FEW_PARTS, FORM) MIXES(2, FEW_PARTS, FORM) MIXES(3, FEW_PARTS, FORM)
FEW_ROWS(FLOAT32) FEW_ROWS(BF16) FEW_ROWS(INT8)
SCORES(4, 2, FLOAT32) MIXES(4, TALL_PARTS, FLOAT32)
#if TALL >= 6
SCORES(6, 2, FLOAT32) MIXES(6, TALL_PARTS, FLOAT32)
#endif
#if TALL >= 12
SCORES(12, 2, FLOAT32)
#endif
#undef FEW_ROWS
#undef SCORES
#undef MIXES

INLINE TARGET float NAME(most)(VEC v) {
  for (int width = LANES / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; i++) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
  return v[0];
}

/* A row's scores of a split to weights. It sees keys [first, last) of the split, and the tile has computed [from, to). */
TARGET static NOINLINE void NAME(weigh)(const struct split *s, int64_t first, int64_t last, float *scores, float *part,
                                        int64_t dim) {
  const int64_t from = s->from / KEYS * KEYS, to = (s->to + KEYS - 1) / KEYS * KEYS;
  if (first >= last) {
    part[dim] = -INFINITY; /* nobody looks at its sums */
    return;
  }
  for (int64_t j = from; j < first; j++) scores[j] = -INFINITY;
  for (int64_t j = last; j < to; j++) scores[j] = -INFINITY;
  VEC tops[2] = {NAME(splat)(-INFINITY), NAME(splat)(-INFINITY)}, total = {0};
  for (int64_t j = from; j < to; j += KEYS)
    UNROLL for (int k = 0; k < KEYS; k += LANES) tops[k / LANES % 2] = MAX(NAME(load)(scores + j + k), tops[k / LANES % 2]);
  const float top = NAME(most)(MAX(tops[0], tops[1]));
  for (int64_t j = from; j < to; j += LANES) {
    const VEC weight = NAME(decay)(NAME(load)(scores + j) - top);
    total += weight;
    NAME(store)(scores + j, weight);
  }
  part[dim] = top;
  part[dim + 1] = NAME(sum)(total);
  if (!s->scaled) return;
  for (int64_t j = from; j < to; j += LANES)
    NAME(store)(scores + j, NAME(load)(scores + j) * NAME(load)(s->value_scales[j / KEYS] + j % KEYS));
}

/* Adds a split's part to a row's result: both are `dim` sums, the maximum that their weights are relative to, and the
 * weights' sum. */
TARGET static NOINLINE void NAME(fold)(float *result, const float *part, int64_t dim) {
  if (part[dim] == -INFINITY) return;
  const float top = part[dim] > result[dim] ? part[dim] : result[dim];
  const VEC differences = {result[dim] - top, part[dim] - top}, factors = NAME(decay)(differences);
  const VEC kept = NAME(splat)(factors[0]), added = NAME(splat)(factors[1]);
  for (int64_t d = 0; d < dim; d += LANES)
    NAME(store)(result + d, NAME(load)(result + d) * kept + NAME(load)(part + d) * added);
  result[dim] = top;
  result[dim + 1] = result[dim + 1] * factors[0] + part[dim + 1] * factors[1];
}

TARGET static NOINLINE void NAME(finish)(const float *result, float *out, int64_t dim) {
  const float inverse = 1.0f / result[dim + 1];
  for (int64_t d = 0; d < dim; d += LANES) NAME(store)(out + d, NAME(load)(result + d) * inverse);
}

/* Widens the keys and values of a split, for many rows to read. */
TARGET static void NAME(widen)(const int form, struct split *s, int64_t dim, float *space) {
  float *keys = space, *values = space + SPLIT * dim;
  for (int64_t g = s->from / KEYS; g < (s->to + KEYS - 1) / KEYS; g++, keys += KEYS * dim, values += KEYS * dim) {
    for (int64_t k = 0; k < dim; k++)
      for (int64_t j = 0; j < KEYS; j += LANES)
        NAME(store)(keys + k * KEYS + j, NAME(load_form)(form, s->keys[g], k * s->key_stride + j));
    for (int64_t j = 0; j < KEYS; j++)
      for (int64_t d = 0; d < dim; d += LANES)
        NAME(store)(values + j * dim + d, NAME(load_form)(form, s->values[g], j * s->value_stride + d));
    s->keys[g] = keys, s->values[g] = values;
  }
  s->key_stride = KEYS, s->value_stride = dim;
}

#define SCORES(ROWS, FORM)                                                            \
  if (count - row >= ROWS) {                                                          \
    NAME(scores_##ROWS##_##FORM)(query + row * dim, dim, &s, scores + row * SPLIT);   \
    row += ROWS;                                                                      \
    continue;                                                                         \
  }
#define MIXES(ROWS, FORM)                                                                             \
  if (count - row >= ROWS) {                                                                          \
    NAME(mixes_##ROWS##_##FORM)(scores + row * SPLIT, dim, &s, part + row * size, size);              \
    row += ROWS;                                                                                      \
    continue;                                                                                         \
  }
#define FEW(DO, FORM) DO(3, FORM) DO(2, FORM) DO(1, FORM)

/* How many rows the tile of scores at `row` has: `query` lies tile by tile. */
INLINE int64_t NAME(height)(int64_t left, int64_t count) {
  if (count <= 3) return left;
  if (TALL >= 12 && left >= 12) return 12;
  if (TALL >= 6 && left >= 6) return 6;
  return left >= 4 ? 4 : left;
}

/* A tile of rows that share a KV head over the splits [begin, end) of their sequence. Their parts go to `parts`, one for a
 * row and a split, `row_parts` splits a row; without `parts` they are folded, and the rows' results go to `out`. */
TARGET static void NAME(attend_tile)(const struct attention *a, const struct tile *t, int64_t begin, int64_t end,
                                     float *space, float *parts, int64_t row_parts) {
  const int64_t dim = a->dim, size = PART_SIZE(dim), group = a->heads / a->kv_heads, count = t->count;
  float *query = space, *scores = query + TILE_ROWS * dim, *part = scores + TILE_ROWS * SPLIT;
  float *result = part + TILE_ROWS * size, *wide = result + TILE_ROWS * size;
  int64_t first[TILE_ROWS], last[TILE_ROWS], start = INT64_MAX, stop = 0;
  const float scale = a->scale * 1.44269504088896341f; /* so that weights are powers of 2 */
  for (int64_t row = 0, height; row < count; row += height) {
    height = NAME(height)(count - row, count);
    for (int64_t r = 0; r < height; r++) {
      const int64_t pair = t->first + row + r, offset = pair / group, head = t->kv_head * group + pair % group;
      const float *from = a->query + (t->row + offset) * a->query_stride + head * dim;
      for (int64_t k = 0; k < dim; k++) query[row * dim + k * height + r] = from[k] * scale;
    }
  }
  for (int64_t row = 0; row < count; row++) {
    const int64_t position = t->before + (t->first + row) / group;
    last[row] = position + 1;
    first[row] = a->window > 0 && last[row] > a->window ? last[row] - a->window : 0;
    start = first[row] < start ? first[row] : start;
    stop = last[row] > stop ? last[row] : stop;
    for (int64_t d = 0; d < dim; d++) result[row * size + d] = 0;
    result[row * size + dim] = -INFINITY;
    result[row * size + dim + 1] = 0;
  }
  for (int64_t number = begin; number < end; number++) {
    const int64_t base = number * SPLIT;
    struct split s = {.scaled = a->form == INT8};
    s.from = start > base ? start - base : 0;
    s.to = stop < base + SPLIT ? stop - base : SPLIT;
    if (s.from < s.to) {
      find_keys(a, t, base, &s);
      int form = a->form;
      if (form != FLOAT32 && count > 3) {
        if (form == BF16) NAME(widen)(BF16, &s, dim, wide);
        else NAME(widen)(INT8, &s, dim, wide);
        form = FLOAT32;
      }
      for (int64_t row = 0; row < count;) {
        if (form == BF16) { FEW(SCORES, BF16) }
        if (form == INT8) { FEW(SCORES, INT8) }
#if TALL >= 12
        SCORES(12, FLOAT32)
#endif
#if TALL >= 6
        SCORES(6, FLOAT32)
#endif
        SCORES(4, FLOAT32) FEW(SCORES, FLOAT32)
      }
      for (int64_t row = 0; row < count; row++)
        NAME(weigh)(&s, first[row] > base ? first[row] - base : 0, last[row] < base + SPLIT ? last[row] - base : SPLIT,
                    scores + row * SPLIT, part + row * size, dim);
      for (int64_t row = 0; row < count;) {
        if (form == BF16) { FEW(MIXES, BF16) }
        if (form == INT8) { FEW(MIXES, INT8) }
#if TALL_MIX >= 6
        MIXES(6, FLOAT32)
#endif
        MIXES(4, FLOAT32) FEW(MIXES, FLOAT32)
      }
    }
    for (int64_t row = 0; row < count; row++) {
      if (!parts) {
        if (s.from < s.to) NAME(fold)(result + row * size, part + row * size, dim);
        continue;
      }
      const int64_t pair = t->first + row, head = t->kv_head * group + pair % group;
      float *to = parts + ((pair / group * a->heads + head) * row_parts + number) * size;
      if (s.from < s.to) memcpy(to, part + row * size, (dim + 2) * sizeof(float));
      else to[dim] = -INFINITY;
    }
  }
  if (parts) return;
  for (int64_t row = 0; row < count; row++) {
    const int64_t pair = t->first + row, head = t->kv_head * group + pair % group;
    NAME(finish)(result + row * size, a->out + ((t->row + pair / group) * a->heads + head) * dim, dim);
  }
}

#undef SCORES
#undef MIXES
#undef FEW

/* Items [begin, end) of a step: tiles of its spans, and where `divides` says so each split of them. */
TARGET static void NAME(attend)(const void *arguments, int64_t begin, int64_t end, int thread) {
  const struct plan *plan = arguments;
  const struct attention *a = plan->attention;
  float *parts = a->scratch, *space = parts + plan->parts * PART_SIZE(a->dim) + thread * tile_space(a->dim, a->form);
  int64_t item = 0; /* of the span's first tile */
  struct place at = {0};
  for (int64_t span = 0; span < a->spans && item < end; span++) {
    const struct extent e = extent_of(plan, span, &at);
    const int64_t per_tile = e.divided ? e.splits : 1, count = e.tiles * a->kv_heads * per_tile;
    for (int64_t i = begin > item ? begin - item : 0; i < end - item && i < count; i++) {
      const int64_t tile = i / per_tile % e.tiles, kv_head = i / per_tile / e.tiles;
      struct tile t = {.row = e.row, .first = tile * TILE_ROWS, .kv_head = kv_head};
      t.count = e.pairs - t.first < TILE_ROWS ? e.pairs - t.first : TILE_ROWS;
      t.before = a->context_lens[span] - e.length;
      t.table = a->block_tables + span * a->max_blocks;
      if (e.divided)
        NAME(attend_tile)(a, &t, i % per_tile, i % per_tile + 1, space, parts + e.parts * PART_SIZE(a->dim), e.splits);
      else NAME(attend_tile)(a, &t, 0, e.splits, space, 0, 0);
    }
    item += count;
  }
}

/* Rows [begin, end), head by head, of the spans that were divided: their parts, folded. */
TARGET static void NAME(fold_parts)(const void *arguments, int64_t begin, int64_t end, int thread) {
  const struct plan *plan = arguments;
  const struct attention *a = plan->attention;
  const int64_t dim = a->dim, size = PART_SIZE(dim);
  float *result = a->scratch + plan->parts * size + thread * tile_space(dim, a->form);
  int64_t item = 0;
  struct place at = {0};
  for (int64_t span = 0; span < a->spans && item < end; span++) {
    const struct extent e = extent_of(plan, span, &at);
    if (!e.divided) continue;
    const int64_t count = e.length * a->heads;
    for (int64_t i = begin > item ? begin - item : 0; i < end - item && i < count; i++) {
      for (int64_t d = 0; d < dim; d++) result[d] = 0;
      result[dim] = -INFINITY;
      result[dim + 1] = 0;
      for (int64_t number = 0; number < e.splits; number++)
        NAME(fold)(result, a->scratch + (e.parts + i * e.splits + number) * size, dim);
      NAME(finish)(result, a->out + (e.row * a->heads + i) * dim, dim);
    }
    item += count;
  }
}

#undef MAX
#undef LOAD_HALVES
#undef TALL
#undef TALL_MIX
#undef TALL_PARTS
#undef FEW_PARTS
#undef NOINLINE
