/* Drawing tokens, as Python and draft.h call it. */

/* Space that a call needs, in bytes. */
EXPORT int64_t pilotfish_draw_space(int64_t rows, int64_t columns) {
  const int64_t chunks = (columns + DRAW_CHUNK - 1) / DRAW_CHUNK;
  return rows * chunks * (int64_t)sizeof(struct draw_part) + rows * (int64_t)sizeof(float);
}

/* tokens[r]: the column that row r draws, by its key and its temperature (0: the likeliest, the first of equals).
 * chances[r]: its probability under softmax(logits / temperature), with ids or without; or 0: not wanted. */
EXPORT void pilotfish_draw(int level, const float *logits, const int32_t *ids, const uint64_t *keys, const float *temperatures,
                           int64_t rows, int64_t columns, void *space, int64_t *tokens, float *chances) {
  const int64_t chunks = (columns + DRAW_CHUNK - 1) / DRAW_CHUNK;
  struct draw_part *parts = space;
  float *most = (float *)(parts + rows * chunks);
  const struct draw a = {logits, ids, keys, temperatures, parts, most, columns, chunks, chances != 0};
  parallel_for(rows * chunks, rows * columns, PICK(level, draw_most), &a);
  for (int64_t r = 0; r < rows; r++) {
    most[r] = parts[r * chunks].most;
    for (int64_t i = 1; i < chunks; i++)
      if (parts[r * chunks + i].most > most[r]) most[r] = parts[r * chunks + i].most;
  }
  parallel_for(rows * chunks, rows * columns * 16, PICK(level, draw), &a);
  for (int64_t r = 0; r < rows; r++) {
    const struct draw_part *part = parts + r * chunks, *winner = part;
    float sum = part->sum;
    for (int64_t i = 1; i < chunks; i++) {
      if (part[i].best > winner->best) winner = part + i;
      sum += part[i].sum;
    }
    tokens[r] = winner->at;
    if (!chances) continue;
    const float scaled = logits[r * columns + winner->at] - most[r];
    const float chance = expf(temperatures[r] == 0.0f ? scaled : scaled / temperatures[r]) / sum;
    chances[r] = chance >= 0.0f ? (chance > 1.0f ? 1.0f : chance) : 0.0f; /* NaN: nothing may be drawn */
  }
}
