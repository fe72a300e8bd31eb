/* The fused decoder: all layers in one call. It runs native.c's kernels in the order of layers/operator_decoder.py, to the
 * same bits. A pass reads weights past all caches, so between two calls from Python its interpreter and torch come from
 * memory again; one call saves those of 12 a layer.
 */

struct weight {
  const void *packed; /* of pilotfish_pack, or with a scale of pilotfish_pack_int8 */
  const float *scale, *bias;
  int64_t columns, in;
};

struct layer {
  const float *input_norm, *mlp_norm;
  const float *q_norm, *k_norm;                     /* of each head, or 0 */
  const float *attention_post_norm, *mlp_post_norm; /* of what attention and MLP add to the hidden states, or 0 */
  const float *cos_sin;
  void *keys, *values;
  struct weight qkv, output, gate_up, down;
  int64_t window;
};

struct step {
  float *hidden;      /* rows x size: of the last layer, afterwards */
  const float *input; /* rows x qkv.in: what attention reads instead of the hidden states' norm; or 0 */
  float *space;       /* pilotfish_space() floats a row */
  float *scratch;     /* as struct attention's, as are the fields from here to scale */
  const int32_t *cu_query_lens, *context_lens, *block_tables;
  const int64_t *positions, *slots;
  int64_t rows, size, heads, kv_heads, dim, spans, max_blocks, block_size, form;
  int64_t gelu; /* the gate's function: GELU, else SiLU */
  float scale, eps;
};

static void apply(int level, const struct weight *w, const float *x, const float *residual, float *out, int64_t rows) {
  if (w->scale) pilotfish_linear_int8(level, x, w->packed, w->scale, w->bias, residual, out, rows, w->columns, w->in);
  else pilotfish_linear(level, x, w->packed, w->bias, residual, out, rows, w->columns, w->in);
}

/* hidden += w . x, or the norm of it; `change` and `normed` are rows x size each. */
static void add(int level, const struct step *s, const struct weight *w, const float *x, const float *post_norm,
                float *change, float *normed) {
  if (!post_norm) {
    apply(level, w, x, s->hidden, s->hidden, s->rows);
    return;
  }
  apply(level, w, x, 0, change, s->rows);
  pilotfish_rms_norm(level, change, s->size, 0, post_norm, normed, s->rows, 1, s->size, s->eps);
  for (int64_t i = 0; i < s->rows * s->size; i++) s->hidden[i] += normed[i];
}

static void decode(int level, const struct layer *l, const struct step *s) {
  const int64_t rows = s->rows, heads = s->heads, kv_heads = s->kv_heads, dim = s->dim;
  const int64_t width = (heads + 2 * kv_heads) * dim, gated_size = l->down.in;
  float *normed = s->space, *change = normed + rows * s->size, *qkv = change + rows * s->size;
  float *q = qkv + rows * width, *k = q + rows * heads * dim, *attended = k + rows * kv_heads * dim;
  float *gate_up = attended + rows * heads * dim, *gated = gate_up + rows * 2 * gated_size;

  if (!s->input) pilotfish_rms_norm(level, s->hidden, s->size, 0, l->input_norm, normed, rows, 1, s->size, s->eps);
  apply(level, &l->qkv, s->input ? s->input : normed, 0, qkv, rows);
  const float *query = qkv, *key = qkv + heads * dim, *value = key + kv_heads * dim;
  int64_t query_stride = width, key_stride = width;
  if (l->q_norm) {
    pilotfish_rms_norm(level, query, width, dim, l->q_norm, q, rows, heads, dim, s->eps);
    pilotfish_rms_norm(level, key, width, dim, l->k_norm, k, rows, kv_heads, dim, s->eps);
    pilotfish_rotate(level, q, heads * dim, s->positions, l->cos_sin, rows, heads, dim);
    pilotfish_rotate(level, k, kv_heads * dim, s->positions, l->cos_sin, rows, kv_heads, dim);
    query = q, key = k, query_stride = heads * dim, key_stride = kv_heads * dim;
  } else {
    pilotfish_rotate(level, qkv, width, s->positions, l->cos_sin, rows, heads + kv_heads, dim);
  }
  write_cache(s->form, key, key_stride, value, width, l->keys, l->values, s->slots, rows, kv_heads, dim, s->block_size);
  const struct attention attention = {query, l->keys, l->values, s->cu_query_lens, s->context_lens, s->block_tables,
                                      attended, s->scratch, query_stride, s->spans, s->max_blocks, heads, kv_heads, dim,
                                      s->block_size, l->window, s->form, s->scale};
  pilotfish_attend(level, &attention);
  add(level, s, &l->output, attended, l->attention_post_norm, change, normed);

  pilotfish_rms_norm(level, s->hidden, s->size, 0, l->mlp_norm, normed, rows, 1, s->size, s->eps);
  apply(level, &l->gate_up, normed, 0, gate_up, rows);
  if (s->gelu) pilotfish_gelu_mul(level, gate_up, gated, rows, gated_size);
  else pilotfish_silu_mul(level, gate_up, gated, rows, gated_size);
  add(level, s, &l->down, gated, l->mlp_post_norm, change, normed);
}

/* Floats of `space` for each row; `gated_size`: the largest layer's. */
EXPORT int64_t pilotfish_space(int64_t size, int64_t heads, int64_t kv_heads, int64_t dim, int64_t gated_size) {
  return 2 * size + (3 * heads + 3 * kv_heads) * dim + 3 * gated_size;
}

EXPORT void pilotfish_decode(int level, const struct layer *layers, int64_t count, const struct step *s) {
  for (int64_t i = 0; i < count; i++) decode(level, layers + i, s);
}
