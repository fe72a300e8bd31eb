/* Drawing tokens, once for each instruction set, as native_target.h is. */

typedef uint32_t NAME(uvec) __attribute__((vector_size(LANES * 4), aligned(4)));
#define UVEC NAME(uvec)

/* log of numbers that are neither 0 nor subnormal, after Cephes' logf: within 2 units in the last place. */
INLINE TARGET VEC NAME(log)(VEC x) {
  const IVEC bits = (IVEC)x;
  VEC exponent = __builtin_convertvector((bits >> 23) - 126, VEC);
  VEC m = (VEC)((bits & 0x007fffff) | 0x3f000000);
  const IVEC low = m < NAME(splat)(0.707106781186547524f);
  exponent = exponent - NAME(select)(low, NAME(splat)(1.0f), NAME(splat)(0.0f));
  m = m + NAME(select)(low, m, NAME(splat)(0.0f)) - 1.0f;
  VEC y = NAME(splat)(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const VEC square = m * m;
  y = y * m * square;
  y = y + exponent * -2.12194440e-4f;
  y = y - 0.5f * square;
  return (m + y) + exponent * 0.693359375f;
}

/* log E of noise.log_exponential, for a vector of token ids. */
INLINE TARGET VEC NAME(noise)(UVEC tokens, uint32_t high, uint32_t low) {
  UVEC z = tokens ^ low;
  z = z * 0xed5ad4bbu;
  z = z ^ (z >> 11);
  z = (z + high) * 0xac4c1b51u;
  z = z ^ (z >> 15);
  z = z * 0x31848babu;
  const IVEC bits = (IVEC)z ^ ((IVEC)z >> 14);
  const VEC v = __builtin_convertvector(bits, VEC) * (-0x1p-31f * (1.0f - 0x1p-24f)) - 0x1p-32f;
  /* log1p(v), whose error the rounding of 1 + v would be (Kahan) */
  const VEC u = 1.0f + v, step = u - 1.0f;
  const VEC exponential = NAME(select)(step == 0.0f, v, NAME(log)(u) * (v / step));
  return NAME(log)(-exponential);
}

INLINE TARGET VEC NAME(some)(const float *x, int64_t left) {
  VEC v = NAME(splat)(-INFINITY);
  for (int64_t i = 0; i < left; i++) v[i] = x[i];
  return v;
}

TARGET static void NAME(draw_most)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct draw *a = arguments;
  for (int64_t item = begin; item < end; item++) {
    const int64_t first = item % a->chunks * DRAW_CHUNK;
    const int64_t last = first + DRAW_CHUNK < a->columns ? first + DRAW_CHUNK : a->columns;
    const float *x = a->logits + item / a->chunks * a->columns;
    VEC most = NAME(splat)(-INFINITY);
    for (int64_t c = first; c < last; c += LANES) {
      const VEC v = c + LANES <= last ? NAME(load)(x + c) : NAME(some)(x + c, last - c);
      most = NAME(select)(v > most, v, most);
    }
    float found = most[0];
    for (int i = 1; i < LANES; i++) found = most[i] > found ? most[i] : found;
    a->parts[item].most = found;
  }
}

TARGET static void NAME(draw)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct draw *a = arguments;
  IVEC lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / a->chunks, first = item % a->chunks * DRAW_CHUNK;
    const int64_t last = first + DRAW_CHUNK < a->columns ? first + DRAW_CHUNK : a->columns;
    const float *x = a->logits + row * a->columns, temperature = a->temperatures[row];
    const uint32_t high = (uint32_t)(a->keys[row] >> 32), low = (uint32_t)a->keys[row];
    const VEC middle = NAME(splat)(a->most[row]), divisor = NAME(splat)(temperature == 0.0f ? 1.0f : temperature);
    VEC best = NAME(splat)(-INFINITY), sum = NAME(splat)(0.0f);
    IVEC at = {0};
    for (int64_t c = first; c < last; c += LANES) {
      const VEC v = c + LANES <= last ? NAME(load)(x + c) : NAME(some)(x + c, last - c);
      const IVEC columns = lanes + (int32_t)c;
      const VEC scaled = (v - middle) / divisor;
      VEC score = scaled;
      if (temperature != 0.0f) {
        UVEC ids = (UVEC)columns;
        if (a->ids)
          for (int i = 0; i < LANES; i++) ids[i] = (uint32_t)a->ids[c + i < last ? c + i : last - 1];
        score = scaled - NAME(noise)(ids, high, low);
      }
      const IVEC wins = score > best;
      best = NAME(select)(wins, score, best);
      at = (wins & columns) | (~wins & at);
      if (a->sums) sum += NAME(exp)(scaled);
    }
    struct draw_part *part = a->parts + item;
    part->best = best[0], part->at = at[0];
    for (int i = 1; i < LANES; i++)
      if (best[i] > part->best || (best[i] == part->best && at[i] < part->at)) part->best = best[i], part->at = at[i];
    part->sum = a->sums ? NAME(sum)(sum) : 0.0f;
  }
}

#undef UVEC
