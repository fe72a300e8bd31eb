/* What the attention of all instruction sets shares: its arguments, and how a step is divided into items of work.
 * attention_target.h has the arithmetic, attention_calls.h what Python calls.
 */

#define KEYS 16          /* keys that lie together in a block, whatever its size */
#define SPLIT 256        /* keys of a split */
#define TILE_ROWS 48     /* most (row, head) pairs of a tile */
#define MOST_PARTS 65536 /* of rows, heads and splits that are computed beside each other: some tens of megabytes */

/* Forms of the cache */
#define FLOAT32 0
#define BF16 1
#define INT8 2
#define FORM_SIZE(form) ((form) == INT8 ? 1 : (form) == BF16 ? 2 : 4)

/* A part of a result: `dim` sums, the maximum and the total of its weights. */
#define PART_SIZE(dim) ((dim) + KEYS)

/* native.py has the same structure.
 *
 * float32 and bfloat16: keys are num_blocks x kv_heads x dim x block_size, so that a register holds one dimension of
 * several keys and no sum runs across it; values num_blocks x block_size x kv_heads x dim. int8: both are num_blocks x
 * kv_heads x (the numbers, keys as dim x block_size and values as block_size x dim, then block_size float32 scales). */
struct attention {
  const float *query; /* rows x heads x dim, row stride query_stride */
  const void *keys, *values;
  const int32_t *cu_query_lens, *context_lens, *block_tables;
  float *out;     /* rows x heads x dim */
  float *scratch; /* pilotfish_attention_scratch() floats */
  int64_t query_stride, spans, max_blocks, heads, kv_heads, dim, block_size, window, form;
  float scale;
};

/* The queries of a span that share a KV head, (row, head) pairs in order, are taken TILE_ROWS at a time. */
struct tile {
  int64_t row, first, count, kv_head; /* the span's first row; its first pair, and how many */
  int64_t before;                     /* keys that the span's first row sees besides its own */
  const int32_t *table;
};

/* Keys [from, to) of a split that a tile looks at, KEYS by KEYS: where they are. */
struct split {
  int64_t from, to, key_stride, value_stride; /* strides of a dimension and of a value, in numbers */
  int scaled;
  const void *keys[SPLIT / KEYS], *values[SPLIT / KEYS];
  const float *key_scales[SPLIT / KEYS], *value_scales[SPLIT / KEYS];
};

static inline void find_keys(const struct attention *a, const struct tile *t, int64_t base, struct split *s) {
  const int64_t dim = a->dim, block_size = a->block_size, whole = block_size * (dim + (int64_t)sizeof(float));
  s->key_stride = block_size;
  s->value_stride = a->form == INT8 ? dim : a->kv_heads * dim;
  for (int64_t g = s->from / KEYS; g < (s->to + KEYS - 1) / KEYS; g++) {
    const int64_t key = base + g * KEYS, offset = key % block_size, block = t->table[key / block_size];
    const int64_t at = block * a->kv_heads + t->kv_head;
    if (a->form == INT8) {
      const char *keys = (const char *)a->keys + at * whole, *values = (const char *)a->values + at * whole;
      s->keys[g] = keys + offset;
      s->values[g] = values + offset * dim;
      s->key_scales[g] = (const float *)(keys + block_size * dim) + offset;
      s->value_scales[g] = (const float *)(values + block_size * dim) + offset;
    } else {
      const int64_t number = FORM_SIZE(a->form);
      s->keys[g] = (const char *)a->keys + (at * dim * block_size + offset) * number;
      s->values[g] = (const char *)a->values + ((block * block_size + offset) * a->kv_heads + t->kv_head) * dim * number;
    }
  }
}

/* Floats that a thread needs for a tile: queries, scores, parts and results, and a split in float32. */
static inline int64_t tile_space(int64_t dim, int64_t form) {
  return TILE_ROWS * (dim + SPLIT + 2 * PART_SIZE(dim)) + (form == FLOAT32 ? 0 : 2 * SPLIT * dim);
}

struct plan {
  const struct attention *attention;
  int64_t work;  /* rows x heads x keys */
  int64_t parts; /* that scratch has room for */
  int threads;
};

struct place {
  int64_t parts; /* of the spans so far */
};

struct extent {
  int64_t row, length, pairs, tiles, splits;
  int64_t parts; /* where this span's begin */
  int divided;   /* whether the splits are computed beside each other */
};

static inline int64_t splits_of(int64_t context) { return (context + SPLIT - 1) / SPLIT; }

/* Of `span`, with the spans before it taken already. A span is divided if one of its tiles is so large a piece of the
 * step's work that threads would wait for each other, as long as there is room for its parts. */
static inline struct extent extent_of(const struct plan *plan, int64_t span, struct place *at) {
  const struct attention *a = plan->attention;
  struct extent e = {.row = a->cu_query_lens[span], .parts = at->parts};
  e.length = a->cu_query_lens[span + 1] - e.row;
  e.pairs = e.length * (a->heads / a->kv_heads);
  e.tiles = (e.pairs + TILE_ROWS - 1) / TILE_ROWS;
  e.splits = splits_of(a->context_lens[span]);
  const int64_t tile = (e.pairs < TILE_ROWS ? e.pairs : TILE_ROWS) * a->context_lens[span];
  const int64_t parts = e.length * a->heads * e.splits;
  e.divided = plan->threads > 1 && e.splits > 1 && 4 * plan->threads * tile > plan->work && at->parts + parts <= plan->parts;
  if (e.divided) at->parts += parts;
  return e;
}
