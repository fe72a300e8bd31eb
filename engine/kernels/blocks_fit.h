/* Quantizing float32 into blocks, included by blocks_target.h for each instruction set: what GGUF calls Q8_0 and Q4_1.
 *
 * Q4_1's scale and minimum are those of the least squared error among TRIES, as in make_qkx2_quants of llama.cpp
 * (https://github.com/ggml-org/ggml, ggml-quants.c): each takes a range a little wider or narrower than the group's, rounds
 * to its 16 levels, and fits scale and minimum to these codes. The best of them is fitted to its own codes REFITS times.
 * A lane is a group, so that no sum runs across a register.
 */

#define TRIES 16
#define FIRST_TRY 12.0f /* the group's range, in steps between the codes 0 and 15 */
#define NEXT_TRY 0.25f
#define REFITS 2

/* The values of LANES groups, from the least of each on; and the best scales and minima so far, from there as well. */
struct NAME(fitted) {
  VEC y[GROUP], sum, gain, scale, minimum;
};

INLINE TARGET VEC NAME(choose)(IVEC mask, VEC yes, VEC no) { return (VEC)((mask & (IVEC)yes) | (~mask & (IVEC)no)); }

/* Rounded to a code of 4 bits. */
INLINE TARGET VEC NAME(code4)(VEC x) {
  const VEC magic = (VEC){0} + 12582912.0f, most = (VEC){0} + 15.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  x = (VEC)((x > 0.0f) & (IVEC)x);
  x = NAME(choose)(x > most, most, x);
  return (x + magic) - magic;
}

/* Fits scale and minimum to the codes that these give, by least squares, and keeps what misses less. What they miss is the
 * sum of squares of y minus the gain. */
INLINE TARGET void NAME(refit)(struct NAME(fitted) *f, VEC inverse, VEC minimum) {
  VEC q = {0}, qq = {0}, qy = {0};
  for (int i = 0; i < GROUP; i++) {
    const VEC code = NAME(code4)((f->y[i] - minimum) * inverse);
    q += code, qq += code * code, qy += code * f->y[i];
  }
  const VEC determinant = (float)GROUP * qq - q * q;
  const VEC scale = ((float)GROUP * qy - q * f->sum) / determinant, found = (qq * f->sum - q * qy) / determinant;
  const VEC gain = scale * qy + found * f->sum;
  const IVEC better = (determinant > 0.0f) & (gain > f->gain);
  f->gain = NAME(choose)(better, gain, f->gain);
  f->scale = NAME(choose)(better, scale, f->scale);
  f->minimum = NAME(choose)(better, found, f->minimum);
}

/* `count` groups, at most LANES. */
TARGET static void NAME(fit_q4_1)(const float *values, uint8_t *out, int count) {
  struct NAME(fitted) f;
  VEC low = {0}, high = {0};
  for (int i = 0; i < GROUP; i++) {
    for (int lane = 0; lane < LANES; lane++) f.y[i][lane] = values[(lane < count ? lane : 0) * GROUP + i];
    low = i ? NAME(choose)(f.y[i] < low, f.y[i], low) : f.y[i];
    high = i ? NAME(choose)(f.y[i] > high, f.y[i], high) : f.y[i];
  }
  f.sum = (VEC){0};
  for (int i = 0; i < GROUP; i++) f.sum += f.y[i] -= low;
  const VEC range = high - low, unit = (VEC)((range > 0.0f) & (IVEC)(1.0f / range));
  f.gain = (VEC){0} - 3.4e38f, f.scale = range / 15.0f, f.minimum = (VEC){0};
  for (int t = 0; t < TRIES; t++) NAME(refit)(&f, unit * (FIRST_TRY + NEXT_TRY * t), (VEC){0});
  for (int t = 0; t < REFITS; t++) NAME(refit)(&f, (VEC)((f.scale > 0.0f) & (IVEC)(1.0f / f.scale)), f.minimum);
  f.scale += f.sum * 0.0f; /* so that a value that is not finite shows */
  for (int lane = 0; lane < count; lane++) {
    uint8_t *block = out + lane * 20;
    const uint16_t halves[2] = {float_to_half(f.scale[lane]), float_to_half(f.minimum[lane] + low[lane])};
    const float scale = half_to_float(halves[0]), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const float minimum = half_to_float(halves[1]) - low[lane];
    memcpy(block, halves, 4);
    int codes[GROUP];
    for (int i = 0; i < GROUP; i++) {
      const float code = (f.y[i][lane] - minimum) * inverse;
      codes[i] = (int)(code > 0.0f ? (code < 15.0f ? code : 15.0f) + 0.5f : 0.5f);
    }
    for (int i = 0; i < 16; i++) block[4 + i] = (uint8_t)(codes[i] | codes[i + 16] << 4);
  }
}

TARGET static void NAME(fit_q8_0)(const float *values, uint8_t *out) {
  const VEC magic = (VEC){0} + 12582912.0f;
  VEC most = {0}, odd = {0};
  for (int i = 0; i < GROUP; i += LANES) {
    const VEC x = *(const VEC *)(values + i), size = NAME(choose)(x < 0.0f, -x, x);
    most = NAME(choose)(size > most, size, most);
    odd += x * 0.0f;
  }
  float largest = 0;
  for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
  for (int lane = 0; lane < LANES; lane++) largest += odd[lane]; /* NaN, if any value is not finite */
  const uint16_t half = float_to_half(largest / 127.0f);
  const float scale = half_to_float(half), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  memcpy(out, &half, 2);
  for (int i = 0; i < GROUP; i += LANES) {
    VEC code = *(const VEC *)(values + i) * inverse;
    code = NAME(choose)(code > 127.0f, (VEC){0} + 127.0f, NAME(choose)(code < -127.0f, (VEC){0} - 127.0f, code));
    code = (code + magic) - magic;
    for (int lane = 0; lane < LANES; lane++) out[2 + i + lane] = (uint8_t)(int8_t)code[lane];
  }
}

/* Groups [begin, end). */
TARGET static void NAME(fit)(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct fit *a = arguments;
  const int64_t size = block_bytes((int)a->kind), step = a->kind == Q4_1 ? LANES : 1;
  for (int64_t g = begin; g < end; g += step) {
    if (a->kind == Q4_1) NAME(fit_q4_1)(a->values + g * GROUP, a->out + g * size, (int)(end - g < step ? end - g : step));
    else NAME(fit_q8_0)(a->values + g * GROUP, a->out + g * size);
  }
}

#undef TRIES
#undef FIRST_TRY
#undef NEXT_TRY
#undef REFITS
