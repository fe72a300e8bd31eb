/* The fused decoder: all layers in one call. It runs native.c's kernels in the order of layers/operator_decoder.py, to the
 * same bits. A pass reads weights past all caches, so between two calls from Python its interpreter and torch come from
 * memory again; one call saves those of 12 a layer.
 */

struct weight {
  const void *packed; /* of pilotfish_pack, or with a scale of pilotfish_pack_int8 */
  const float *scale, *bias;
  int64_t columns, in;
  const struct part *parts; /* of a matrix in parts, which has nothing packed above */
  int64_t count;
};

struct layer {
  const float *input_norm, *mlp_norm;
  const float *q_norm, *k_norm;                     /* of each head, or 0 */
  const float *attention_post_norm, *mlp_post_norm; /* of what attention and MLP add to the hidden states, or 0 */
  const float *cos_sin;
  void *keys, *values;
  struct weight qkv, output, gate_up, down;
  int64_t window;
  const struct low_rank_linear *qkv_change, *output_change, *gate_up_change, *down_change; /* of adapters, or 0 */
};

struct step {
  float *hidden;      /* rows x size: of the last layer, afterwards */
  const float *input; /* rows x qkv.in: what attention reads instead of the hidden states' norm; or 0 */
  float *space;       /* pilotfish_space() floats a row */
  struct activation *activations; /* space for a row's quantized activations: of the widest input */
  float *scratch;     /* as struct attention's, as are the fields from here to scale */
  const int32_t *cu_query_lens, *context_lens, *block_tables;
  const int64_t *positions, *slots;
  int64_t rows, size, heads, kv_heads, dim, spans, max_blocks, block_size, form;
  int64_t gelu; /* the gate's function: GELU, else SiLU */
  const struct low_rank_pass *adapted; /* the rows that have an adapter; or 0 */
  float scale, eps;
};

/* activations: space for as many rows of quantized activations, if the matrix is in parts */
static void apply(int level, const struct weight *w, const float *x, const float *residual, float *out, int64_t rows,
                  struct activation *activations) {
  if (w->count)
    pilotfish_linear_parts(level, x, w->parts, w->count, w->bias, residual, out, rows, w->columns, w->in, activations);
  else if (w->scale) pilotfish_linear_int8(level, x, w->packed, w->scale, w->bias, residual, out, rows, w->columns, w->in);
  else pilotfish_linear(level, x, w->packed, w->bias, residual, out, rows, w->columns, w->in);
}

/* out = w . x, and what adapters change in it */
static void adapt(int level, const struct step *s, const struct weight *w, const struct low_rank_linear *l, const float *x,
                  float *out) {
  apply(level, w, x, 0, out, s->rows, s->activations);
  if (s->adapted && l) pilotfish_low_rank(level, l, s->adapted, x, out, w->in, w->columns);
}

/* hidden += w . x, or the norm of it; `change` and `normed` are rows x size each. */
static void add(int level, const struct step *s, const struct weight *w, const struct low_rank_linear *l, const float *x,
                const float *post_norm, float *change, float *normed) {
  if (!post_norm && !(s->adapted && l)) {
    apply(level, w, x, s->hidden, s->hidden, s->rows, s->activations);
    return;
  }
  adapt(level, s, w, l, x, change);
  if (post_norm) pilotfish_rms_norm(level, change, s->size, 0, post_norm, normed, s->rows, 1, s->size, s->eps);
  const float *added = post_norm ? normed : change;
  for (int64_t i = 0; i < s->rows * s->size; i++) s->hidden[i] += added[i];
}

static void decode(int level, const struct layer *l, const struct step *s) {
  const int64_t rows = s->rows, heads = s->heads, kv_heads = s->kv_heads, dim = s->dim;
  const int64_t width = (heads + 2 * kv_heads) * dim, gated_size = l->down.in;
  float *normed = s->space, *change = normed + rows * s->size, *qkv = change + rows * s->size;
  float *q = qkv + rows * width, *k = q + rows * heads * dim, *attended = k + rows * kv_heads * dim;
  float *gate_up = attended + rows * heads * dim, *gated = gate_up + rows * 2 * gated_size;

  if (!s->input) pilotfish_rms_norm(level, s->hidden, s->size, 0, l->input_norm, normed, rows, 1, s->size, s->eps);
  adapt(level, s, &l->qkv, l->qkv_change, s->input ? s->input : normed, qkv);
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
  add(level, s, &l->output, l->output_change, attended, l->attention_post_norm, change, normed);

  pilotfish_rms_norm(level, s->hidden, s->size, 0, l->mlp_norm, normed, rows, 1, s->size, s->eps);
  adapt(level, s, &l->gate_up, l->gate_up_change, normed, gate_up);
  if (s->gelu) pilotfish_gelu_mul(level, gate_up, gated, rows, gated_size);
  else pilotfish_silu_mul(level, gate_up, gated, rows, gated_size);
  add(level, s, &l->down, l->down_change, gated, l->mlp_post_norm, change, normed);
}

/* Floats of `space` for each row; `gated_size`: the largest layer's. */
EXPORT int64_t pilotfish_space(int64_t size, int64_t heads, int64_t kv_heads, int64_t dim, int64_t gated_size) {
  return 2 * size + (3 * heads + 3 * kv_heads) * dim + 3 * gated_size;
}

EXPORT void pilotfish_decode(int level, const struct layer *layers, int64_t count, const struct step *s) {
  for (int64_t i = 0; i < count; i++) decode(level, layers + i, s);
}
