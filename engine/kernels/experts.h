/* A layer's experts in one call: each row's, grouped by expert, and their results summed with the router's
 * probabilities. Between two kernels of so few rows and columns Python would take longer than they do.
 *
 * A row's results do not depend on the rows that share its experts, as those of `apply` do not, and are added up in the
 * order of its own probabilities, by the same operations for any number of rows.
 */

struct expert {
  struct weight gate_up, down; /* neither packed nor in parts: it is on another rank, and adds nothing */
};

struct experts {
  const struct expert *experts;
  const float *x;       /* rows x size */
  const float *probs;   /* rows x each: of a row's experts, the most likely first */
  const int64_t *chosen; /* rows x each: their numbers */
  float *out;           /* rows x size */
  float *space;         /* rows x each x (2 size + 3 inner) */
  int64_t *places;      /* count + 1 + rows x each */
  struct activation *activations; /* for `rows` quantized rows of the wider input */
  int64_t count, rows, each, size, inner;
};

/* Rows [begin, end): out = the sum of the row's results times its probabilities. */
static void sum_experts(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct experts *s = arguments;
  const float *results = s->space + s->rows * s->each * s->size;
  const int64_t *place = s->places + s->count + 1;
  for (int64_t r = begin; r < end; r++) {
    float *out = s->out + r * s->size;
    for (int64_t i = 0; i < s->each; i++) {
      const float *result = results + place[r * s->each + i] * s->size, prob = s->probs[r * s->each + i];
      if (i == 0)
        for (int64_t k = 0; k < s->size; k++) out[k] = result[k] * prob;
      else
        for (int64_t k = 0; k < s->size; k++) out[k] += result[k] * prob;
    }
  }
}

EXPORT void pilotfish_experts(int level, const struct experts *s) {
  const int64_t pairs = s->rows * s->each, size = s->size;
  float *grouped = s->space, *results = grouped + pairs * size, *gate_up = results + pairs * size;
  float *gated = gate_up + pairs * 2 * s->inner;
  int64_t *starts = s->places, *place = starts + s->count + 1;
  memset(starts, 0, (s->count + 1) * sizeof(int64_t));
  for (int64_t p = 0; p < pairs; p++) starts[s->chosen[p] + 1]++;
  for (int64_t e = 0; e < s->count; e++) starts[e + 1] += starts[e];
  for (int64_t p = 0; p < pairs; p++) { /* starts[e] moves on to the end of expert e's rows */
    place[p] = starts[s->chosen[p]]++;
    memcpy(grouped + place[p] * size, s->x + p / s->each * size, size * sizeof(float));
  }
  for (int64_t e = 0, begin = 0; e < s->count; begin = starts[e++]) {
    const int64_t rows = starts[e] - begin;
    const struct expert *expert = s->experts + e;
    if (!rows) continue;
    if (!expert->gate_up.packed && !expert->gate_up.count) {
      memset(results + begin * size, 0, rows * size * sizeof(float));
      continue;
    }
    apply(level, &expert->gate_up, grouped + begin * size, 0, gate_up, rows, s->activations);
    pilotfish_silu_mul(level, gate_up, gated, rows, s->inner);
    apply(level, &expert->down, gated, 0, results + begin * size, rows, s->activations);
  }
  parallel_for(s->rows, pairs * size, sum_experts, s);
}
