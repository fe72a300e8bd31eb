/* Attention as Python calls it, and writing to the cache. */

static uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return (uint16_t)(bits >> 16 | 64); /* rounding could make an infinity of a NaN */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* A key or value as whole numbers of -127 to 127 times a scale, which is the largest's magnitude / 127. */
static void write_int8(const float *from, int64_t dim, int8_t *to, int64_t stride, float *scale) {
  float most = 0;
  for (int64_t k = 0; k < dim; k++) most = fabsf(from[k]) > most ? fabsf(from[k]) : most;
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  *scale = most / 127.0f;
  for (int64_t k = 0; k < dim; k++) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const float number = (from[k] * inverse + magic) - magic;
    to[k * stride] = number >= -127 && number <= 127 ? (int8_t)number : 0; /* 0: a NaN's sequence is lost anyhow */
  }
}

static void write_cache(int64_t form, const float *key, int64_t key_stride, const float *value, int64_t value_stride,
                        void *keys, void *values, const int64_t *slots, int64_t rows, int64_t kv_heads, int64_t dim,
                        int64_t block_size) {
  const int64_t size = kv_heads * dim;
  for (int64_t r = 0; r < rows; r++, key += key_stride, value += value_stride) {
    const int64_t block = slots[r] / block_size, offset = slots[r] % block_size;
    if (form == FLOAT32) {
      memcpy((float *)values + slots[r] * size, value, size * sizeof(float));
      float *to = (float *)keys + block * size * block_size + offset;
      for (int64_t k = 0; k < size; k++) to[k * block_size] = key[k];
    } else if (form == BF16) {
      uint16_t *to = (uint16_t *)values + slots[r] * size;
      for (int64_t k = 0; k < size; k++) to[k] = to_bf16(value[k]);
      to = (uint16_t *)keys + block * size * block_size + offset;
      for (int64_t k = 0; k < size; k++) to[k * block_size] = to_bf16(key[k]);
    } else {
      const int64_t whole = block_size * (dim + (int64_t)sizeof(float));
      for (int64_t head = 0; head < kv_heads; head++) {
        int8_t *to = (int8_t *)keys + (block * kv_heads + head) * whole;
        write_int8(key + head * dim, dim, to + offset, block_size, (float *)(to + block_size * dim) + offset);
        to = (int8_t *)values + (block * kv_heads + head) * whole;
        write_int8(value + head * dim, dim, to + offset * dim, 1, (float *)(to + block_size * dim) + offset);
      }
    }
  }
}

/* The rows' keys and values to their slots of the cache, laid out as `struct attention` says; row stride `stride`. */
EXPORT void pilotfish_write_cache(int64_t form, const float *key, const float *value, int64_t stride, void *keys,
                                  void *values, const int64_t *slots, int64_t rows, int64_t kv_heads, int64_t dim,
                                  int64_t block_size) {
  write_cache(form, key, stride, value, stride, keys, values, slots, rows, kv_heads, dim, block_size);
}

static int64_t most_parts(int64_t rows, int64_t heads, int64_t context) {
  const int64_t parts = rows * heads * splits_of(context);
  return parts < MOST_PARTS ? parts : MOST_PARTS;
}

/* Floats of scratch for a step of so many rows, none of which sees more than `context` keys, with the threads as they are. */
EXPORT int64_t pilotfish_attention_scratch(int64_t rows, int64_t context, int64_t heads, int64_t dim, int64_t form) {
  return most_parts(rows, heads, context) * PART_SIZE(dim) + pool.threads * tile_space(dim, form);
}

EXPORT void pilotfish_attend(int level, const struct attention *a) {
  struct plan plan = {.attention = a, .threads = pool.threads};
  int64_t context = 0, items = 0, folded = 0;
  for (int64_t span = 0; span < a->spans; span++) {
    plan.work += (a->cu_query_lens[span + 1] - a->cu_query_lens[span]) * a->heads * a->context_lens[span];
    if (a->context_lens[span] > context) context = a->context_lens[span];
  }
  plan.parts = most_parts(a->cu_query_lens[a->spans], a->heads, context);
  struct place at = {0};
  for (int64_t span = 0; span < a->spans; span++) {
    const struct extent e = extent_of(&plan, span, &at);
    items += e.tiles * a->kv_heads * (e.divided ? e.splits : 1);
    folded += e.divided ? e.length * a->heads : 0;
  }
  parallel_for(items, plan.work * a->dim, PICK(level, attend), &plan);
  parallel_for(folded, at.parts * a->dim, PICK(level, fold_parts), &plan);
}
