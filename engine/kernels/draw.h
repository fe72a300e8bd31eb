/* Drawing tokens: the likeliest, or the winner of the race of sampling/sampler.py by the noise of sampling/noise.py. */

#define DRAW_CHUNK 4096 /* columns that one thread takes at a time: sums are over these first, whatever the threads */

struct draw_part {
  float most, best, sum; /* the highest logit; the winner's score; the sum of exp(scaled) */
  int32_t at;            /* the winner */
};

struct draw {
  const float *logits;      /* rows x columns */
  const int32_t *ids;       /* of each column, for the noise; or 0: its number */
  const uint64_t *keys;     /* of each row: noise.row_key */
  const float *temperatures; /* of each row; 0: the likeliest */
  struct draw_part *parts;  /* rows x chunks */
  const float *most;        /* of each row */
  int64_t columns, chunks;
  int sums;
};
