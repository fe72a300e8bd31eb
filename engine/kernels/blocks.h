/* Matrices of quantized blocks: how they are packed, and rows of activations quantized for them.
 *
 * A matrix stays in the bits of its file (https://github.com/ggml-org/ggml, ggml-common.h). It is packed into panels of
 * PANEL columns; a panel is a sequence of groups of GROUP values of k:
 *
 *   codes   8 steps of 4 values of k for each column, columns side by side: what one instruction multiplies.
 *           4 bits: 4 x 64 bytes, low halves of bytes for an even step and high halves for the one after it;
 *           5 bits: then the highest bits, 8 x 64 bits; 6 bits: then the two highest, 4 steps in a byte; 8 bits: a byte each
 *   scales  HALVES: float16 for each column; MINIMA: the same, then float16 minima;
 *           SUPER: bytes, multipliers of the scales and of the minima; SUPER_16: signed bytes for each 16 values
 *
 * and before each 8 groups of SUPER and SUPER_16 there are the float16 scales, and minima, that the bytes multiply.
 *
 * A value is scale * (code - offset), or scale * code + minimum. Codes are unsigned and activations int8 in groups of as
 * many, so that a group's products are summed in integers, exactly and in any order. Sums over groups are in float32,
 * one group after the other: the rule of native_target.h.
 */

#define GROUP 32
#define SUPER_GROUPS 8

enum scales { HALVES, MINIMA, SUPER, SUPER_16 };

struct form {
  int bits, scales, offset;
};

/* The numbers of https://github.com/ggml-org/ggml/blob/master/include/ggml.h, enum ggml_type. */
enum kind { F32 = 0, FLOAT16 = 1, BFLOAT16 = 30, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

#define FORM_OF(kind)                                \
  ((kind) == Q4_0   ? (struct form){4, HALVES, 8}    \
   : (kind) == Q4_1 ? (struct form){4, MINIMA, 0}    \
   : (kind) == Q5_0 ? (struct form){5, HALVES, 16}   \
   : (kind) == Q5_1 ? (struct form){5, MINIMA, 0}    \
   : (kind) == Q8_0 ? (struct form){8, HALVES, 128}  \
   : (kind) == Q4_K ? (struct form){4, SUPER, 0}     \
   : (kind) == Q5_K ? (struct form){5, SUPER, 0}     \
   : (kind) == Q6_K ? (struct form){6, SUPER_16, 32} \
                    : (struct form){0, 0, 0})

#define CODE_BYTES(f) ((f).bits * GROUP * PANEL / 8)
#define GROUP_BYTES(f) (CODE_BYTES(f) + PANEL * ((f).scales == MINIMA ? 4 : 2))
#define SUPER_BYTES(f) (PANEL * ((f).scales == SUPER ? 4 : (f).scales == SUPER_16 ? 2 : 0))
/* Bytes from a panel's start to a group, which begins with its super-group's scales if it is the first of them. */
#define GROUP_PLACE(f, group) \
  ((group) * GROUP_BYTES(f) + (((group) + SUPER_GROUPS - 1) / SUPER_GROUPS) * SUPER_BYTES(f))

/* A row's values of a group. */
struct activation {
  int8_t code[GROUP];
  float scale, scaled_sum; /* the scale times the sum of the codes */
  int32_t sum[2];          /* of each half's codes */
};

/* A part of a matrix: the columns from `first` on, all of one kind. */
struct part {
  const void *packed;
  int64_t kind, first, columns;
};

struct linear_blocks {
  const struct activation *x; /* rows x in / GROUP */
  const uint8_t *packed;
  const float *bias, *residual;
  float *out;
  int64_t rows, columns, in, stride; /* stride: of out and residual */
};

struct quantize {
  const float *x;
  struct activation *out;
  int64_t in;
};

/* Values in groups of GROUP, to be quantized into blocks. */
struct fit {
  const float *values;
  uint8_t *out;
  int64_t kind;
};

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, digits = h & 0x3ff;
  union {
    uint32_t bits;
    float value;
  } found;
  if (exponent == 31) found.bits = sign | 0x7f800000 | digits << 13;
  else if (exponent) found.bits = sign | (exponent + 112) << 23 | digits << 13;
  else {
    found.value = (float)digits * 0x1p-24f;
    found.bits |= sign;
  }
  return found.value;
}

/* Rounded to the nearest, ties to even; infinite beyond the largest. */
static inline uint16_t float_to_half(float x) {
  union {
    float value;
    uint32_t bits;
  } from = {x};
  const uint32_t sign = from.bits >> 16 & 0x8000, size = from.bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x47800000) return (uint16_t)(sign | 0x7c00);
  if (size < 0x38800000) { /* a multiple of 2^-24, which adding 0.5 leaves in the lowest digits */
    from.bits = size;
    from.value += 0.5f;
    return (uint16_t)(sign | (from.bits - 0x3f000000));
  }
  return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

/* Whether matrices of this kind are in blocks, and not in floats. */
static inline int is_blocks(int64_t kind) { return kind != F32 && kind != FLOAT16 && kind != BFLOAT16; }

/* A group of one column as the file has it. */
struct block {
  uint8_t code[GROUP];
  uint16_t scale, minimum;       /* float16; of SUPER and SUPER_16 the super-group's */
  uint8_t multiplier, of_minimum; /* of SUPER */
  int8_t halves[2];              /* of SUPER_16 */
};

static int64_t block_bytes(int kind) {
  switch (kind) {
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q4_K: return 144;
    case Q5_K: return 176;
    case Q6_K: return 210;
    default: return 0;
  }
}

static inline uint16_t half_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static void read_small(int kind, const uint8_t *p, struct block *to) {
  const int five = kind == Q5_0 || kind == Q5_1, minima = kind == Q4_1 || kind == Q5_1;
  to->scale = half_at(p);
  to->minimum = minima ? half_at(p + 2) : 0;
  const uint8_t *high = p + (minima ? 4 : 2), *low = high + (five ? 4 : 0);
  for (int i = 0; i < 32; i++) {
    to->code[i] = i < 16 ? low[i] & 15 : low[i - 16] >> 4;
    if (five) to->code[i] |= (high[i / 8] >> i % 8 & 1) << 4;
  }
}

static void read_k(int kind, const uint8_t *p, int group, struct block *to) {
  const uint8_t *scales = p + 4, *high = p + 16, *low = kind == Q5_K ? p + 48 : p + 16;
  to->scale = half_at(p);
  to->minimum = half_at(p + 2);
  if (group < 4) {
    to->multiplier = scales[group] & 63;
    to->of_minimum = scales[group + 4] & 63;
  } else {
    to->multiplier = (scales[group + 4] & 15) | (scales[group - 4] >> 6) << 4;
    to->of_minimum = scales[group + 4] >> 4 | (scales[group] >> 6) << 4;
  }
  for (int i = 0; i < 32; i++) {
    const uint8_t both = low[group / 2 * 32 + i];
    to->code[i] = group % 2 ? both >> 4 : both & 15;
    if (kind == Q5_K) to->code[i] |= (high[i] >> group & 1) << 4;
  }
}

static void read_q6_k(const uint8_t *p, int group, struct block *to) {
  const int half = group / 4, quarter = group % 4;
  const uint8_t *low = p + 64 * half + 32 * (quarter % 2), *high = p + 128 + 32 * half;
  const int8_t *scales = (const int8_t *)p + 192 + 8 * half + 2 * quarter;
  to->scale = half_at(p + 208);
  to->halves[0] = scales[0];
  to->halves[1] = scales[1];
  for (int i = 0; i < 32; i++)
    to->code[i] = (quarter < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * quarter & 3) << 4;
}

static void read_block(int kind, const uint8_t *row, int64_t group, struct block *to) {
  if (kind >= Q4_K) {
    const uint8_t *p = row + group / SUPER_GROUPS * block_bytes(kind);
    if (kind == Q6_K) read_q6_k(p, group % SUPER_GROUPS, to);
    else read_k(kind, p, group % SUPER_GROUPS, to);
    return;
  }
  const uint8_t *p = row + group * block_bytes(kind);
  if (kind != Q8_0) {
    read_small(kind, p, to);
    return;
  }
  to->scale = half_at(p);
  for (int i = 0; i < 32; i++) to->code[i] = p[2 + i] ^ 0x80;
}

/* The group of a column into its panel. */
static void write_block(struct form f, const struct block *from, uint8_t *super, uint8_t *group, int column) {
  for (int i = 0; i < GROUP; i++) {
    const int step = i / 4, place = column * 4 + i % 4;
    if (f.bits == 8) {
      group[step * 64 + place] = from->code[i];
      continue;
    }
    group[step / 2 * 64 + place] |= (from->code[i] & 15) << (step % 2 ? 4 : 0);
    const int high = from->code[i] >> 4;
    if (f.bits == 5) group[256 + step * 8 + place / 8] |= high << place % 8;
    if (f.bits == 6) group[256 + step / 4 * 64 + place] |= high << 2 * (step % 4);
  }
  uint8_t *scales = group + CODE_BYTES(f);
  if (f.scales == SUPER) {
    scales[column] = from->multiplier;
    scales[PANEL + column] = from->of_minimum;
  } else if (f.scales == SUPER_16) {
    scales[column] = (uint8_t)from->halves[0];
    scales[PANEL + column] = (uint8_t)from->halves[1];
  }
  uint8_t *halves = f.scales >= SUPER ? super : scales;
  memcpy(halves + 2 * column, &from->scale, 2);
  if (f.scales == MINIMA || f.scales == SUPER) memcpy(halves + 2 * PANEL + 2 * column, &from->minimum, 2);
}

struct pack_blocks {
  const uint8_t *rows;
  uint8_t *packed;
  int64_t kind, columns, in;
  _Atomic int64_t *infinite;
};

static int is_finite(uint16_t half) { return (half >> 10 & 31) != 31; }

static void pack_blocks(const void *arguments, int64_t begin, int64_t end, int thread) {
  (void)thread;
  const struct pack_blocks *a = arguments;
  const int kind = (int)a->kind;
  const struct form f = FORM_OF(kind);
  const int64_t groups = a->in / GROUP, size = GROUP_PLACE(f, groups), row_bytes = groups / (kind >= Q4_K ? 8 : 1) * block_bytes(kind);
  struct block block = {0};
  for (int64_t p = begin; p < end; p++) {
    uint8_t *panel = a->packed + p * size, *super = panel;
    for (int64_t group = 0; group < groups; group++) {
      uint8_t *place = panel + GROUP_PLACE(f, group);
      if (group % SUPER_GROUPS == 0) super = place, place += SUPER_BYTES(f);
      for (int column = 0; column < PANEL && p * PANEL + column < a->columns; column++) {
        read_block(kind, a->rows + (p * PANEL + column) * row_bytes, group, &block);
        if (!is_finite(block.scale) || !is_finite(block.minimum)) atomic_fetch_add(a->infinite, 1);
        write_block(f, &block, super, place, column);
      }
    }
  }
}

/* The values of one row of the matrix, `column` of the product. */
static void unpack_row(struct form f, const uint8_t *packed, int64_t column, int64_t in, float *out) {
  const int64_t groups = in / GROUP;
  const uint8_t *panel = packed + column / PANEL * GROUP_PLACE(f, groups), *super = panel;
  const int c = column % PANEL;
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t *group = panel + GROUP_PLACE(f, g);
    if (g % SUPER_GROUPS == 0) super = group, group += SUPER_BYTES(f);
    const uint8_t *scales = group + CODE_BYTES(f), *halves = f.scales >= SUPER ? super : scales;
    const float scale = half_to_float(half_at(halves + 2 * c));
    const float minimum =
        f.scales == MINIMA || f.scales == SUPER ? half_to_float(half_at(halves + 2 * PANEL + 2 * c)) : 0.0f;
    for (int i = 0; i < GROUP; i++) {
      const int step = i / 4, place = c * 4 + i % 4;
      int code = f.bits == 8 ? group[step * 64 + place] : group[step / 2 * 64 + place] >> (step % 2 ? 4 : 0) & 15;
      if (f.bits == 5) code |= (group[256 + step * 8 + place / 8] >> place % 8 & 1) << 4;
      if (f.bits == 6) code |= (group[256 + step / 4 * 64 + place] >> 2 * (step % 4) & 3) << 4;
      const float value = (float)(code - f.offset);
      if (f.scales == SUPER) out[g * GROUP + i] = scale * scales[c] * value - minimum * scales[PANEL + c];
      else if (f.scales == SUPER_16) out[g * GROUP + i] = scale * (int8_t)scales[i / 16 * PANEL + c] * value;
      else out[g * GROUP + i] = scale * value + minimum;
    }
  }
}
