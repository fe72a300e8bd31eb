/* The kernel of low_rank.h, once for each instruction set, after native_target.h, whose tiles it is made of: a row's bits
 * do not depend on the rows that are computed with it.
 */

enum { NAME(max_tile) = MAX_TILE };

/* Items [begin, end): a part of a chunk each, which no other item's rows and columns overlap. */
TARGET static void NAME(low_rank)(const void *arguments, int64_t begin, int64_t end, int thread) {
  const struct low_rank *s = arguments;
  const int64_t in = s->in, most = s->linear->most;
  float *gathered = s->pass->scratch + thread * s->pass->scratch_size, *y = gathered + MAX_TILE * in, *h = y + MAX_TILE * PANEL;
  for (int64_t i = begin; i < end; i++) {
    const struct low_rank_chunk *chunk = s->pass->chunks + i / most;
    const struct low_rank_change *change = s->linear->changes + chunk->slot;
    if (i % most >= change->count) continue;
    const struct low_rank_part *part = change->parts + i % most;
    for (int64_t row = chunk->begin, n; row < chunk->end; row += n) {
      const int32_t *rows = s->pass->rows + row;
      n = chunk->end - row < MAX_TILE ? chunk->end - row : MAX_TILE;
      const float *x = s->x + rows[0] * in;
      if (rows[n - 1] - rows[0] != n - 1) { /* they are in order: not one after the other */
        for (int64_t r = 0; r < n; r++) memcpy(gathered + r * in, s->x + rows[r] * in, in * sizeof(float));
        x = gathered;
      }
      for (int64_t p = 0; p < part->rank; p += PANEL) {
        const float *panel = part->a + p * in;
        NAME(tile)((int)n, x, in, panel, 0, 0, h + p, part->rank, PANEL, n > 1 ? panel + PANEL * PREFETCH : 0, 0);
      }
      for (int64_t p = 0; p < part->columns; p += PANEL) {
        const float *panel = part->b + p * part->rank;
        NAME(tile)((int)n, h, part->rank, panel, 0, 0, y, PANEL, PANEL, panel + PANEL * PREFETCH, 0);
        const int64_t left = part->columns - p < PANEL ? part->columns - p : PANEL;
        for (int64_t r = 0; r < n; r++) {
          float *out = s->out + rows[r] * s->columns + part->first + p;
          if (left == PANEL)
            UNROLL for (int c = 0; c < PANEL; c++) out[c] += y[r * PANEL + c];
          else
            for (int64_t c = 0; c < left; c++) out[c] += y[r * PANEL + c];
        }
      }
    }
  }
}
