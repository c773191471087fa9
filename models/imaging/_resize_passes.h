/* The inner loops of _resize.c, which includes this file once for each kind of processor, with PASS(name) as their names. */

/* ---- vertical: rows of n bytes -> one line ---- */

static void PASS(blend_short)(const uint8_t *const *rows, const uint16_t *weights, int taps, size_t n, uint16_t *line)
{
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t length = n - start < BLOCK ? n - start : BLOCK;
        uint16_t *sums = line + start;
        memset(sums, 0, length * sizeof *sums);
        for (int k = 0; k < taps; k += GROUP) { /* taps is a multiple of GROUP; rows beyond the used have weight 0 */
            const uint8_t *a = rows[k] + start, *b = rows[k + 1] + start, *c = rows[k + 2] + start, *d = rows[k + 3] + start;
            uint16_t wa = weights[k], wb = weights[k + 1], wc = weights[k + 2], wd = weights[k + 3];
            for (size_t i = 0; i < length; i++) {
                uint16_t va = ((uint32_t)(uint16_t)(a[i] << 8) * wa) >> 16, vb = ((uint32_t)(uint16_t)(b[i] << 8) * wb) >> 16;
                uint16_t vc = ((uint32_t)(uint16_t)(c[i] << 8) * wc) >> 16, vd = ((uint32_t)(uint16_t)(d[i] << 8) * wd) >> 16;
                sums[i] = (uint16_t)(sums[i] + va + vb + vc + vd);
            }
        }
    }
}

static void PASS(blend_rows)(const uint8_t *const *rows, const int32_t *weights, int taps, size_t n, int32_t *line)
{
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t length = n - start < BLOCK ? n - start : BLOCK;
        int32_t *sums = line + start;
        memset(sums, 0, length * sizeof *sums);
        for (int k = 0; k < taps; k += GROUP) {
            const uint8_t *a = rows[k] + start, *b = rows[k + 1] + start, *c = rows[k + 2] + start, *d = rows[k + 3] + start;
            int32_t wa = weights[k], wb = weights[k + 1], wc = weights[k + 2], wd = weights[k + 3];
            for (size_t i = 0; i < length; i++) sums[i] += a[i] * wa + b[i] * wb + c[i] * wc + d[i] * wd;
        }
    }
}

static void PASS(round_line)(const int32_t *line, size_t n, uint8_t *out)
{
    for (size_t i = 0; i < n; i++) {
        int32_t level = (line[i] + (1 << (FRACTION - 1))) >> FRACTION;
        out[i] = level < 0 ? 0 : level > 255 ? 255 : level;
    }
}

/* ---- horizontal: one line -> one row of output pixels ---- */

/* Each reads 4 samples at every pixel but the last; the fourth lane is never used. */
static void PASS(spread_bytes)(const uint8_t *line, size_t width, int_pixel *pixels)
{
    for (size_t i = 0; i + 1 < width; i++) pixels[i] = __builtin_convertvector(*(const bytes4 *)(line + 3 * i), int_pixel);
    const uint8_t *last = line + 3 * (width - 1);
    pixels[width - 1] = (int_pixel){last[0], last[1], last[2], 0};
}

static void PASS(spread_short)(const uint16_t *line, size_t width, float bias, pixel *pixels)
{
    for (size_t i = 0; i + 1 < width; i++)
        pixels[i] = __builtin_convertvector(*(const words4 *)(line + 3 * i), pixel) + bias;
    const uint16_t *last = line + 3 * (width - 1);
    pixels[width - 1] = (pixel){last[0], last[1], last[2], 0} + bias;
}

static void PASS(spread_sums)(const int32_t *line, size_t width, pixel *pixels)
{
    const float unit = 1.f / (1 << (FRACTION - 8)); /* to 1/256 of a level, as in spread_short */
    for (size_t i = 0; i < width; i++) pixels[i] = (pixel){line[3 * i], line[3 * i + 1], line[3 * i + 2], 0} * unit;
}

/* Writes the fourth byte too, but for the last pixel: the next one overwrites it. */
static inline void PASS(store_clipped)(int_pixel level, int last, uint8_t *out)
{
    level &= level > 0;
    int_pixel over = level > 255;
    level = (level & ~over) | (over & 255);
    bytes4 bytes = __builtin_convertvector(level, bytes4);
    memcpy(out, &bytes, last ? 3 : 4);
}

/* Pixels in 1/256 of a level, weights LANES times over in units of 1. */
static void PASS(blend_pixels)(const pixel *pixels, const side *x, const float *spread, uint8_t *out)
{
    for (int i = 0; i < x->count; i++, out += 3) {
        const float *source = (const float *)(pixels + x->first[i]), *weights = spread + (size_t)i * x->taps * LANES;
        group sum = {0};
        for (int k = 0; k < x->used[i]; k += GROUP)
            sum += *(const group *)(source + k * LANES) * *(const group *)(weights + k * LANES);
        pixel part[GROUP];
        memcpy(part, &sum, sizeof sum);
        pixel level = ((part[0] + part[1]) + (part[2] + part[3])) * (1 / 256.f) + 0.5f;
        PASS(store_clipped)(__builtin_convertvector(level, int_pixel), i == x->count - 1, out);
    }
}

/* Pixels in levels, weights LANES times over in units of 1 / 2^FRACTION. */
static void PASS(blend_int_pixels)(const int_pixel *pixels, const side *x, const int32_t *spread, uint8_t *out)
{
    for (int i = 0; i < x->count; i++, out += 3) {
        const int32_t *source = (const int32_t *)(pixels + x->first[i]), *weights = spread + (size_t)i * x->taps * LANES;
        int_group sum = {0};
        for (int k = 0; k < x->used[i]; k += GROUP)
            sum += *(const int_group *)(source + k * LANES) * *(const int_group *)(weights + k * LANES);
        int_pixel part[GROUP];
        memcpy(part, &sum, sizeof sum);
        int_pixel level = (part[0] + part[1]) + (part[2] + part[3]) + (1 << (FRACTION - 1));
        PASS(store_clipped)(level >> FRACTION, i == x->count - 1, out);
    }
}
