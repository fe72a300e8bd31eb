/* A head's drafts, whole: its first pass over what it has not read, and the passes that each read the token before, in one
 * call. Between calls from Python its interpreter and torch come from memory again, and take as long as such a small model.
 * It computes what models/eagle3.py and speculation/drafters/growth.py do on the host, in the same order.
 */

struct draft_head {
  struct weight fusion, embedding, head;
  const float *embedding_norm, *hidden_norm, *norm;
  const struct layer *layer;
  const int32_t *target_ids; /* of each of the head's tokens; or 0: the same */
  int64_t size, heads, kv_heads, dim, space, activations; /* space, activations: floats a row, of struct step */
  int64_t normed_residual;   /* whether the residual is the hidden states' norm */
  float scale, eps;
};

struct drafting {
  /* The first pass: its rows, as struct step has them; block_tables have room for the drafts. */
  const float *features; /* rows x fusion.in */
  const int64_t *tokens, *positions, *slots;
  const int32_t *cu_query_lens, *context_lens, *block_tables;
  int64_t rows, spans, max_blocks, block_size, form;
  /* Of each span: the most tokens of its draft, 0 for none; the product of chances below which it ends. */
  const int64_t *limits;
  const float *floors, *temperatures;
  const uint64_t *keys; /* spans x most: of the drafted tokens' positions */
  int64_t most;
  /* Results: of each span its tokens, with their chances, spans x most, and how many; the rows of each further pass. */
  int64_t *drafted;
  float *chances;
  int64_t *counts, *passes;
};

/* What a call computes with, in one piece of memory. */
struct draft_space {
  float *hidden, *fused, *embedded, *both, *decoder, *activations, *scratch, *kept, *normed, *logits, *temperatures, *chances;
  int64_t *tokens, *positions, *slots, *drawn, *going;
  uint64_t *keys;
  int32_t *cu_query_lens, *context_lens, *block_tables;
  void *draw;
};

static void *piece(char *base, int64_t *used, int64_t bytes) {
  void *at = base + *used;
  *used += (bytes + 63) / 64 * 64;
  return at;
}

/* Lay the pieces out from `base`; returns the bytes. context: tokens that any row sees. */
static int64_t lay_out(struct draft_space *s, char *base, const struct draft_head *h, int64_t rows, int64_t spans,
                       int64_t max_blocks, int64_t context, int64_t form) {
  int64_t used = 0;
  const int64_t f = sizeof(float), n = rows > spans ? rows : spans;
  s->hidden = piece(base, &used, n * h->size * f);
  s->fused = piece(base, &used, n * h->size * f);
  s->embedded = piece(base, &used, n * h->size * f);
  s->both = piece(base, &used, n * 2 * h->size * f);
  s->decoder = piece(base, &used, n * h->space * f);
  s->activations = piece(base, &used, n * h->activations * f);
  s->scratch = piece(base, &used, f * pilotfish_attention_scratch(n, context, h->heads, h->dim, form));
  s->kept = piece(base, &used, spans * h->size * f);
  s->normed = piece(base, &used, spans * h->size * f);
  s->logits = piece(base, &used, spans * h->head.columns * f);
  s->temperatures = piece(base, &used, spans * f);
  s->chances = piece(base, &used, spans * f);
  s->tokens = piece(base, &used, spans * 8);
  s->positions = piece(base, &used, spans * 8);
  s->slots = piece(base, &used, spans * 8);
  s->drawn = piece(base, &used, spans * 8);
  s->going = piece(base, &used, spans * 8);
  s->keys = piece(base, &used, spans * 8);
  s->cu_query_lens = piece(base, &used, (spans + 1) * 4);
  s->context_lens = piece(base, &used, spans * 4);
  s->block_tables = piece(base, &used, spans * max_blocks * 4);
  s->draw = piece(base, &used, pilotfish_draw_space(spans, h->head.columns));
  return used;
}

EXPORT int64_t pilotfish_draft_space(const struct draft_head *h, int64_t rows, int64_t spans, int64_t max_blocks,
                                     int64_t context, int64_t form) {
  struct draft_space s;
  return lay_out(&s, 0, h, rows, spans, max_blocks, context, form);
}

static void embed(const struct weight *w, const int64_t *ids, float *out, int64_t rows) {
  if (w->count) pilotfish_unpack_blocks(w->parts->packed, w->parts->kind, ids, out, rows, w->in);
  else pilotfish_unpack_rows(w->packed, ids, out, rows, w->in);
}

/* The layer over the rows of `step`, whose hidden states it replaces. */
static void draft_pass(int level, const struct draft_head *h, struct draft_space *s, struct step *step, const int64_t *tokens) {
  const int64_t size = h->size, rows = step->rows;
  embed(&h->embedding, tokens, s->embedded, rows);
  pilotfish_rms_norm(level, s->embedded, size, 0, h->embedding_norm, s->fused, rows, 1, size, h->eps);
  pilotfish_rms_norm(level, step->hidden, size, 0, h->hidden_norm, s->embedded, rows, 1, size, h->eps);
  for (int64_t r = 0; r < rows; r++) {
    memcpy(s->both + r * 2 * size, s->fused + r * size, size * sizeof(float));
    memcpy(s->both + r * 2 * size + size, s->embedded + r * size, size * sizeof(float));
  }
  if (h->normed_residual) memcpy(step->hidden, s->embedded, rows * size * sizeof(float));
  step->input = s->both;
  decode(level, h->layer, step);
}

EXPORT void pilotfish_draft(int level, const struct draft_head *h, const struct drafting *d, int64_t context, void *space) {
  struct draft_space s;
  lay_out(&s, space, h, d->rows, d->spans, d->max_blocks, context, d->form);
  const int64_t size = h->size, most = d->most;
  apply(level, &h->fusion, d->features, 0, s.hidden, d->rows, (struct activation *)s.activations);
  struct step step = {s.hidden, 0, s.decoder, (struct activation *)s.activations, s.scratch, d->cu_query_lens,
                      d->context_lens, d->block_tables, d->positions, d->slots, d->rows, size, h->heads, h->kv_heads, h->dim,
                      d->spans, d->max_blocks, d->block_size, d->form, 0, 0, h->scale, h->eps};
  draft_pass(level, h, &s, &step, d->tokens);
  /* The rows that drafts begin with; from here on row i of all arrays is of span going[i]. */
  int64_t going = 0;
  for (int64_t i = 0; i < d->spans; i++) {
    d->counts[i] = 0;
    if (!d->limits[i]) continue;
    const int64_t row = d->cu_query_lens[i + 1] - 1;
    memcpy(s.kept + going * size, s.hidden + row * size, size * sizeof(float));
    s.positions[going] = d->positions[row];
    s.context_lens[going] = d->context_lens[i];
    memcpy(s.block_tables + going * d->max_blocks, d->block_tables + i * d->max_blocks, d->max_blocks * sizeof(int32_t));
    s.going[going++] = i;
  }
  memset(d->passes, 0, most * sizeof(int64_t));
  for (int64_t depth = 0; going; depth++) {
    for (int64_t i = 0; i < going; i++) {
      s.keys[i] = d->keys[s.going[i] * most + depth];
      s.temperatures[i] = d->temperatures[s.going[i]];
    }
    pilotfish_rms_norm(level, s.kept, size, 0, h->norm, s.normed, going, 1, size, h->eps);
    apply(level, &h->head, s.normed, 0, s.logits, going, (struct activation *)s.activations);
    pilotfish_draw(level, s.logits, h->target_ids, s.keys, s.temperatures, going, h->head.columns, s.draw, s.drawn, s.chances);
    int64_t left = 0;
    for (int64_t i = 0; i < going; i++) {
      const int64_t span = s.going[i], token = h->target_ids ? h->target_ids[s.drawn[i]] : s.drawn[i];
      const int64_t count = d->counts[span]++;
      d->drafted[span * most + count] = token;
      d->chances[span * most + count] = s.chances[i];
      double survival = 1.0;
      for (int64_t at = 0; at <= count; at++) survival *= d->chances[span * most + at];
      if (count + 1 >= d->limits[span] || survival < d->floors[span]) continue;
      /* It goes on: its row moves up to the others that do. */
      memmove(s.hidden + left * size, s.kept + i * size, size * sizeof(float));
      memmove(s.block_tables + left * d->max_blocks, s.block_tables + i * d->max_blocks, d->max_blocks * sizeof(int32_t));
      const int64_t position = s.positions[i] + 1, block = s.block_tables[left * d->max_blocks + position / d->block_size];
      s.positions[left] = position;
      s.slots[left] = block * d->block_size + position % d->block_size;
      s.context_lens[left] = s.context_lens[i] + 1;
      s.tokens[left] = token;
      s.going[left++] = span;
    }
    going = left;
    if (!going) break;
    d->passes[depth] = going;
    for (int64_t i = 0; i <= going; i++) s.cu_query_lens[i] = (int32_t)i;
    step.cu_query_lens = s.cu_query_lens, step.context_lens = s.context_lens, step.block_tables = s.block_tables;
    step.positions = s.positions, step.slots = s.slots, step.rows = step.spans = going;
    draft_pass(level, h, &s, &step, s.tokens);
    memcpy(s.kept, s.hidden, going * size * sizeof(float));
  }
}
