/* Low-rank adapters (LoRA, arXiv 2106.09685): out += b . (a . x) for rows that each have their own adapter, or none. The
 * structures; the kernel is in low_rank_target.h.
 */

/* The change of `columns` outputs of a linear from `first` on. Both matrices are packed (pilotfish_pack), `rank` is a
 * multiple of PANEL: what is beyond the adapter's own is 0. */
struct low_rank_part {
  const float *a; /* rank x in */
  const float *b; /* columns x rank */
  int64_t rank, first, columns;
};

/* What one adapter changes in a linear. */
struct low_rank_change {
  const struct low_rank_part *parts;
  int64_t count;
};

/* All adapters of a linear, by their slots. */
struct low_rank_linear {
  const struct low_rank_change *changes;
  int64_t most; /* parts of one of them; 0: none changes this linear */
};

/* Rows of one adapter that are computed together. */
struct low_rank_chunk {
  int32_t slot, begin, end; /* of `rows` below */
};

/* A pass: which rows have which adapter. */
struct low_rank_pass {
  const int32_t *rows; /* those with an adapter, in the order of the chunks */
  const struct low_rank_chunk *chunks;
  float *scratch; /* of each thread */
  int64_t count, scratch_size;
};

struct low_rank {
  const struct low_rank_linear *linear;
  const struct low_rank_pass *pass;
  const float *x;
  float *out;
  int64_t in, columns;
};
