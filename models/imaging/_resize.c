/* Antialiased resizing of 8-bit RGB in two one-dimensional passes, within one grey level of Pillow's.
 *
 * Each output pixel is a weighted mean of the source pixels under a filter (triangle, or Keys' cubic with a = -1/2) that
 * is as wide as the scale; at the edges the weights are normalised anew. Only the source under the kept window is read.
 *
 * Triangle: no weight is negative, so neither the order of the passes nor what is rounded between them matters by more
 * than a level. Vertical goes first, over whole contiguous rows, which leaves 1/scale of the work to the horizontal pass.
 * Cubic: it overshoots, and Pillow rounds and clips between its passes, after which a difference of one level may grow
 * to two, and another order to thirty. So here order and arithmetic (22 fractional bits) are Pillow's, and so is every bit.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    GROUP = 4,        /* pixels that the horizontal pass takes at once */
    LANES = 4,        /* floats per pixel: red, green, blue, and one that is not used */
    BLOCK = 2048,     /* samples whose sums stay in the first-level cache during the vertical pass */
    FRACTION = 22,    /* bits of a weight after the point; 255 times the weights of a cubic still fit 32 bits */
    SHORT_TAPS = 96,  /* up to here 16-bit sums err by less than 0.4 levels: half a unit of 1/256 for each tap, twice */
};

typedef float group __attribute__((vector_size(GROUP * LANES * sizeof(float)), aligned(4), may_alias));
typedef float pixel __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t int_group __attribute__((vector_size(GROUP * LANES * sizeof(int32_t)), aligned(4), may_alias));
typedef int32_t int_pixel __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));
typedef uint8_t bytes4 __attribute__((vector_size(4), aligned(1), may_alias));
typedef uint16_t words4 __attribute__((vector_size(8), aligned(2), may_alias));

/* One side: output pixel i is the sum of weights[i * taps + k] * source[first[i] + k] over k < used[i]. */
typedef struct {
    int count, taps;
    int *first, *used;
    int32_t *weights; /* in units of 1 / 2^FRACTION */
} side;

static double triangle(double x) { return x < 0 ? fmax(1 + x, 0) : fmax(1 - x, 0); }

static double cubic(double x)
{
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return 0;
}

static void side_free(side *s)
{
    free(s->first);
    free(s->used);
    free(s->weights);
}

static int side_make(side *s, int source, int scaled, int start, int count, int bicubic)
{
    double (*filter)(double) = bicubic ? cubic : triangle;
    double scale = (double)source / scaled, width = scale > 1 ? scale : 1, reach = (bicubic ? 2 : 1) * width;
    int taps = 2 * (int)ceil(reach) + 1;
    if (taps > source) taps = source;
    taps = (taps + GROUP - 1) / GROUP * GROUP;
    s->count = count;
    s->taps = taps;
    s->first = malloc(count * sizeof(int));
    s->used = malloc(count * sizeof(int));
    s->weights = calloc((size_t)count * taps, sizeof *s->weights);
    if (!s->first || !s->used || !s->weights) return 0;
    for (int i = 0; i < count; i++) {
        double centre = (start + i + 0.5) * scale, sum = 0;
        int first = (int)(centre - reach + 0.5), end = (int)(centre + reach + 0.5);
        if (first < 0) first = 0;
        if (end > source) end = source;
        if (end > first + taps) end = first + taps;
        for (int k = first; k < end; k++) sum += filter((k - centre + 0.5) / width);
        int32_t *weights = s->weights + (size_t)i * taps;
        for (int k = first; k < end; k++)
            weights[k - first] = (int32_t)round(filter((k - centre + 0.5) / width) / sum * (1 << FRACTION));
        s->first[i] = first;
        s->used[i] = end - first;
    }
    return 1;
}

/* The passes are compiled once for every processor, and on x86 for those of 2013 and 2017 too; `choose_passes` picks. */
typedef struct {
    void (*blend_short)(const uint8_t *const *, const uint16_t *, int, size_t, uint16_t *);
    void (*blend_rows)(const uint8_t *const *, const int32_t *, int, size_t, int32_t *);
    void (*round_line)(const int32_t *, size_t, uint8_t *);
    void (*spread_bytes)(const uint8_t *, size_t, int_pixel *);
    void (*spread_short)(const uint16_t *, size_t, float, pixel *);
    void (*spread_sums)(const int32_t *, size_t, pixel *);
    void (*blend_pixels)(const pixel *, const side *, const float *, uint8_t *);
    void (*blend_int_pixels)(const int_pixel *, const side *, const int32_t *, uint8_t *);
} passes;

#define PASSES(suffix)                                                                                                     \
    (passes){blend_short##suffix,  blend_rows##suffix,  round_line##suffix,   spread_bytes##suffix,                        \
             spread_short##suffix, spread_sums##suffix, blend_pixels##suffix, blend_int_pixels##suffix}

#define PASS(name) name##_plain
#include "_resize_passes.h"
#undef PASS

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_PASSES 1
#pragma GCC push_options
#pragma GCC target("arch=haswell")
#define PASS(name) name##_avx2
#include "_resize_passes.h"
#undef PASS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#define PASS(name) name##_avx512
#include "_resize_passes.h"
#undef PASS
#pragma GCC pop_options
#endif

static passes chosen;

static void choose_passes(void)
{
    chosen = PASSES(_plain);
#ifdef HAS_X86_PASSES
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) chosen = PASSES(_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        chosen = PASSES(_avx512);
#endif
}

/* ---- the whole ---- */

typedef struct {
    const uint8_t *source;
    int height, width;
    uint8_t *out;
    ptrdiff_t out_stride;
    int bicubic, rows_first;
} job;

/* Scratch, all of it bounded by one row or one window of rows. */
typedef struct {
    const uint8_t **rows;
    uint16_t *short_weights, *short_line;
    int32_t *line;
    void *spread; /* the horizontal weights: int32_t for cubic, float for triangle */
    void *pixels; /* one row: int_pixel, or pixel */
    uint8_t *ring, *rounded;
} scratch;

static void scratch_free(scratch *s)
{
    free(s->rows);
    free(s->short_weights);
    free(s->short_line);
    free(s->line);
    free(s->spread);
    free(s->pixels);
    free(s->ring);
    free(s->rounded);
}

static int scratch_make(scratch *s, const side *y, const side *x, int columns, int bicubic)
{
    size_t n = (size_t)(columns > x->count ? columns : x->count) * 3, total = (size_t)x->count * x->taps;
    s->rows = malloc(y->taps * sizeof *s->rows);
    s->short_weights = malloc(y->taps * sizeof *s->short_weights);
    s->short_line = malloc(n * sizeof *s->short_line);
    s->line = malloc(n * sizeof *s->line);
    s->spread = malloc(total * LANES * sizeof(float));
    s->pixels = calloc((size_t)columns + x->taps, sizeof(pixel)); /* zeros beyond the last column: groups read over it */
    s->ring = malloc(bicubic ? (size_t)y->taps * x->count * 3 : 1);
    s->rounded = malloc(n);
    if (!s->rows || !s->short_weights || !s->short_line || !s->line || !s->spread || !s->pixels || !s->ring || !s->rounded)
        return 0;
    for (size_t k = 0; k < total; k++)
        for (int lane = 0; lane < LANES; lane++)
            if (bicubic)
                ((int32_t *)s->spread)[k * LANES + lane] = x->weights[k];
            else
                ((float *)s->spread)[k * LANES + lane] = x->weights[k] * (1.f / (1 << FRACTION));
    return 1;
}

static int whole_groups(int taps) { return (taps + GROUP - 1) / GROUP * GROUP; }

static void vertical_first(const passes *p, const job *j, const side *y, const side *x, int left, int columns, scratch *s)
{
    size_t stride = (size_t)j->width * 3, n = (size_t)columns * 3;
    int use_short = !j->bicubic && y->taps <= SHORT_TAPS;
    for (int i = 0; i < y->count; i++) {
        const int32_t *weights = y->weights + (size_t)i * y->taps;
        int used = y->used[i], taps = whole_groups(used);
        uint8_t *out = j->out + i * j->out_stride;
        for (int k = 0; k < taps; k++)
            s->rows[k] = j->source + (size_t)(y->first[i] + (k < used ? k : used - 1)) * stride + (size_t)left * 3;
        if (use_short) {
            for (int k = 0; k < taps; k++) {
                int32_t weight = (weights[k] + (1 << (FRACTION - 17))) >> (FRACTION - 16);
                s->short_weights[k] = weight > UINT16_MAX ? UINT16_MAX : weight;
            }
            p->blend_short(s->rows, s->short_weights, taps, n, s->short_line);
            p->spread_short(s->short_line, columns, used * 0.5f, s->pixels); /* each tap was rounded down */
            p->blend_pixels(s->pixels, x, s->spread, out);
            continue;
        }
        p->blend_rows(s->rows, weights, taps, n, s->line);
        if (j->bicubic) {
            p->round_line(s->line, n, s->rounded);
            p->spread_bytes(s->rounded, columns, s->pixels);
            p->blend_int_pixels(s->pixels, x, s->spread, out);
        } else {
            p->spread_sums(s->line, columns, s->pixels);
            p->blend_pixels(s->pixels, x, s->spread, out);
        }
    }
}

static void horizontal_first(const passes *p, const job *j, const side *y, const side *x, int left, int columns, scratch *s)
{
    size_t stride = (size_t)j->width * 3, n = (size_t)x->count * 3;
    int done = y->first[0]; /* the rows before it are in the ring, or no longer needed */
    for (int i = 0; i < y->count; i++) {
        int used = y->used[i], taps = whole_groups(used), end = y->first[i] + used;
        for (; done < end; done++) {
            p->spread_bytes(j->source + done * stride + (size_t)left * 3, columns, s->pixels);
            p->blend_int_pixels(s->pixels, x, s->spread, s->ring + (size_t)(done % y->taps) * n);
        }
        for (int k = 0; k < taps; k++)
            s->rows[k] = s->ring + (size_t)((y->first[i] + (k < used ? k : used - 1)) % y->taps) * n;
        p->blend_rows(s->rows, y->weights + (size_t)i * y->taps, taps, n, s->line);
        p->round_line(s->line, n, j->out + i * j->out_stride);
    }
}

static int run(const job *j, const int *y_span, const int *x_span)
{
    side y = {0}, x = {0};
    scratch s = {0};
    int made = side_make(&y, j->height, y_span[0], y_span[1], y_span[2], j->bicubic)
        && side_make(&x, j->width, x_span[0], x_span[1], x_span[2], j->bicubic);
    if (made) {
        int left = x.first[0], right = left; /* the columns under the kept window */
        for (int i = 0; i < x.count; i++) {
            if (x.first[i] < left) left = x.first[i];
            if (x.first[i] + x.used[i] > right) right = x.first[i] + x.used[i];
        }
        for (int i = 0; i < x.count; i++) x.first[i] -= left;
        made = scratch_make(&s, &y, &x, right - left, j->bicubic);
        if (made) (j->bicubic && !j->rows_first ? horizontal_first : vertical_first)(&chosen, j, &y, &x, left, right - left, &s);
    }
    side_free(&y);
    side_free(&x);
    scratch_free(&s);
    return made;
}

static int span_is_valid(int source, const int *span)
{
    return source > 0 && span[0] > 0 && span[1] >= 0 && span[2] > 0 && span[1] <= span[0] - span[2];
}

PyDoc_STRVAR(resize_doc,
    "resize(source, size_hw, y_span, x_span, bicubic, rows_first, out)\n\n"
    "source: contiguous uint8 of at least height*width*3 bytes; a span is (scaled, start, count);\n"
    "rows_first: cubic only, whether the vertical pass comes first; out: uint8 [y count, x count, 3], rows may be apart.\n"
    "Raises ValueError where these do not fit together. The GIL is released.");

static PyObject *resize(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *source_object, *out_object;
    int y_span[3], x_span[3];
    job j = {0};
    if (!PyArg_ParseTuple(args, "O(ii)(iii)(iii)ppO:resize", &source_object, &j.height, &j.width, &y_span[0], &y_span[1],
                          &y_span[2], &x_span[0], &x_span[1], &x_span[2], &j.bicubic, &j.rows_first, &out_object))
        return NULL;
    if (!span_is_valid(j.height, y_span) || !span_is_valid(j.width, x_span))
        return PyErr_Format(PyExc_ValueError, "a span is (scaled, start, count) with 0 < count and start + count <= scaled");
    Py_buffer source, out;
    if (PyObject_GetBuffer(source_object, &source, PyBUF_SIMPLE) < 0) return NULL;
    if (PyObject_GetBuffer(out_object, &out, PyBUF_STRIDED) < 0) {
        PyBuffer_Release(&source);
        return NULL;
    }
    PyObject *result = NULL;
    if ((size_t)source.len / 3 / j.width < (size_t)j.height)
        PyErr_Format(PyExc_ValueError, "source has %zd bytes, too few for %d rows of %d pixels", source.len, j.height, j.width);
    else if (out.itemsize != 1 || out.ndim != 3 || out.shape[0] != y_span[2] || out.shape[1] != x_span[2] || out.shape[2] != 3
             || out.strides[2] != 1 || out.strides[1] != 3)
        PyErr_Format(PyExc_ValueError, "out is uint8 [%d, %d, 3] with contiguous rows", y_span[2], x_span[2]);
    else {
        int made;
        j.source = source.buf;
        j.out = out.buf;
        j.out_stride = out.strides[0];
        Py_BEGIN_ALLOW_THREADS
        made = run(&j, y_span, x_span);
        Py_END_ALLOW_THREADS
        result = made ? Py_NewRef(Py_None) : PyErr_NoMemory();
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {{"resize", resize, METH_VARARGS, resize_doc}, {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "models.imaging._resize", .m_size = 0, .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__resize(void) 
{
    choose_passes();
    return PyModuleDef_Init(&definition);
}
