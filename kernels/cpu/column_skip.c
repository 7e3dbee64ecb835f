/* Expert FFNs of one MoE layer that read the weights of kept channels alone: plain C, one thread, sums in float32.
 *
 * A channel j of a token is kept where |x_j| * weight_j lies above a threshold. That is tested inside the loop over
 * channels, and a kept one adds x_j times its column, which lies in one piece; eight columns go together, so that the
 * sums are read and written once for eight. Of a chunk of tokens the union of kept channels is read, each column once;
 * a token adds nothing through a channel that it did not keep itself.
 * Letters: T tokens, H hidden, F expert width, E experts, N assignments sorted by expert, R rank.
 */
#include <stdint.h>
#include <string.h>

#include "products.h"
#include "rules.h"

#define TILE 512 /* so much of each stays in the first cache while the tokens of a chunk take their turns */

enum { INPUT, GATE, HIDDEN, SITES };

struct layer {
    int64_t hidden, width, chunk;
    int32_t bfloat16, activation, gated;
    const void *const *first; /* [E] columns [H, 2F] of gate and up; [H, F] of gate beside `up`, or of up alone */
    const void *const *up;    /* [E] rows [F, H], read for the neurons that their gate keeps; NULL without site GATE */
    const void *const *down;  /* [E] columns [F, H] */
    struct site sites[SITES];
};

/* How many channels were kept, of how many: counted for each token, and for each chunk (any of its tokens). */
struct count {
    int64_t kept, channels, columns_read, columns;
};

/* Up to eight channels that some token of a chunk keeps; x [n, 8] is 0 where a token does not. */
struct eight {
    int64_t filled, at[COLUMNS];
};

static void fill_up(struct eight *some, float *x, int64_t n)
{
    for (int64_t c = some->filled; c < COLUMNS; c++) {
        some->at[c] = some->at[0];
        for (int64_t t = 0; t < n; t++) x[t * COLUMNS + c] = 0;
    }
}

static void flush(struct matrix m, struct eight *some, float *x, float *const *y, int64_t n)
{
    int64_t tile = n == 1 ? m.length : TILE;
    fill_up(some, x, n);
    for (int64_t from = 0; from < m.length; from += tile) {
        int64_t rest = m.length - from;
        for (int64_t t = 0; t < n; t++)
            add_columns(m, some->at, x + t * COLUMNS, y[t], from, rest < tile ? rest : tile);
    }
    some->filled = 0;
}

/* y[t] += scale[t] * W x[t] over the channels that t keeps. With `used` and `rest` [n, channels] x is divided: what was
 * kept, and what was left out. */
static void product(struct matrix m, const float *const *x, int64_t n, int64_t channels, struct rule *rule,
                    const float *scale, float *const *y, float *used, float *rest, struct count *count)
{
    float kept_x[n * COLUMNS];
    struct eight some = {0, {0}};
    int64_t kept = 0, columns = 0;
    for (int64_t j = 0; j < channels; j++) {
        int any = 0;
        for (int64_t t = 0; t < n; t++) {
            int keep = keeps(rule, t, x[t][j], j);
            kept_x[t * COLUMNS + some.filled] = keep ? x[t][j] * scale[t] : 0;
            if (used) used[t * channels + j] = keep ? x[t][j] : 0;
            if (rest) rest[t * channels + j] = keep ? 0 : x[t][j];
            any |= keep;
            kept += keep;
        }
        some.at[some.filled] = j;
        some.filled += any;
        columns += any;
        if (some.filled == COLUMNS) flush(m, &some, kept_x, y, n);
    }
    if (some.filled) flush(m, &some, kept_x, y, n);
    count->kept += kept, count->channels += n * channels;
    count->columns_read += columns, count->columns += channels;
}

/* hidden[t] = gate * (up x[t]) for the eight neurons that a chunk keeps, where t keeps them itself. */
static void flush_rows(struct matrix m, struct eight *some, float *gate, const float *const *x, int64_t n,
                       int64_t width, float *hidden)
{
    float up[COLUMNS];
    int64_t filled = some->filled;
    fill_up(some, gate, n);
    for (int64_t t = 0; t < n; t++) {
        dot_rows(m, some->at, x[t], up);
        for (int64_t c = 0; c < filled; c++) hidden[t * width + some->at[c]] = gate[t * COLUMNS + c] * up[c];
    }
    some->filled = 0;
}

/* hidden [n, F] = gate * (up x) for the neurons that their gate keeps; 0 for the others, whose rows stay unread. */
static void gated_rows(struct matrix m, const float *const *x, const float *const *gate, int64_t n, int64_t width,
                       struct rule *rule, float *hidden, struct count *count)
{
    float kept_gate[n * COLUMNS];
    struct eight some = {0, {0}};
    int64_t kept = 0, columns = 0;
    memset(hidden, 0, sizeof *hidden * n * width);
    for (int64_t j = 0; j < width; j++) {
        int any = 0;
        for (int64_t t = 0; t < n; t++) {
            int keep = keeps(rule, t, gate[t][j], j);
            kept_gate[t * COLUMNS + some.filled] = keep ? gate[t][j] : 0;
            any |= keep;
            kept += keep;
        }
        some.at[some.filled] = j;
        some.filled += any;
        columns += any;
        if (some.filled == COLUMNS) flush_rows(m, &some, kept_gate, x, n, width, hidden);
    }
    if (some.filled) flush_rows(m, &some, kept_gate, x, n, width, hidden);
    count->kept += kept, count->channels += n * width;
    count->columns_read += columns, count->columns += width;
}

/* The work of one chunk: its tokens, where they are summed up, and memory for what is between. */
struct work {
    const struct layer *layer;
    int64_t expert, n;
    const float *const *x, *scale;
    float *const *y;
    float *before, *hidden, *used, *rest, *low; /* [n, 2F], [n, F], [n, H], [n, max(H, F)], [n, max R] */
    uint32_t *bits;                             /* [max(H, F)] */
    struct count *counts;
};

/* y += scale * (the matrix of a site, over what it keeps of x, and its low-rank part of the rest). */
static void site_product(const struct work *w, int site, const void *columns, int64_t outputs, const float *const *x,
                         int64_t channels, float otherwise, const float *scale, float *const *y, float *used)
{
    const struct site *at = &w->layer->sites[site];
    float threshold[w->n], ones[w->n], none[w->n], *low[w->n];
    int64_t ties[w->n], no_ties[w->n];
    const float *left_out[w->n], *between[w->n];
    struct rule rule = {NULL, threshold, ties}, nonzero = {NULL, none, no_ties};
    struct matrix m = {columns, outputs, w->layer->bfloat16};
    struct count ignored = {0, 0, 0, 0};
    set_rule(&rule, at, w->expert, x, w->n, channels, otherwise, w->bits);
    product(m, x, w->n, channels, &rule, scale, y, used, at->right ? w->rest : NULL, &w->counts[site]);
    if (!at->right) return;
    for (int64_t t = 0; t < w->n; t++) {
        ones[t] = 1, none[t] = 0, no_ties[t] = 0;
        left_out[t] = w->rest + t * channels, between[t] = low[t] = w->low + t * at->rank;
    }
    memset(w->low, 0, sizeof *w->low * w->n * at->rank);
    struct matrix right = {at->right[w->expert], at->rank, w->layer->bfloat16};
    struct matrix left = {at->left[w->expert], outputs, w->layer->bfloat16};
    product(right, left_out, w->n, channels, &nonzero, ones, low, NULL, NULL, &ignored);
    product(left, between, w->n, at->rank, &nonzero, scale, y, NULL, NULL, &ignored);
}

/* What down reads [n, F], in w->hidden; returns the threshold that down has where it has no rule of its own. */
static float hidden_of(const struct work *w)
{
    const struct layer *layer = w->layer;
    int64_t F = layer->width, outputs = layer->gated && !layer->up ? 2 * F : F;
    float ones[w->n], *sums[w->n], threshold[w->n];
    const float *gate[w->n], *used[w->n];
    int64_t ties[w->n];
    memset(w->before, 0, sizeof *w->before * w->n * outputs);
    for (int64_t t = 0; t < w->n; t++) {
        ones[t] = 1, gate[t] = sums[t] = w->before + t * outputs;
        used[t] = layer->sites[INPUT].active ? w->used + t * layer->hidden : w->x[t];
    }
    float *split = layer->up && layer->sites[INPUT].active ? w->used : NULL;
    site_product(w, INPUT, layer->first[w->expert], outputs, w->x, layer->hidden, -1, ones, sums, split);
    if (layer->up) {
        struct matrix up = {layer->up[w->expert], layer->hidden, layer->bfloat16};
        struct rule rule = {NULL, threshold, ties};
        activate(w->before, w->n * F, layer->activation);
        set_rule(&rule, &layer->sites[GATE], w->expert, gate, w->n, F, -1, w->bits);
        gated_rows(up, used, gate, w->n, F, &rule, w->hidden, &w->counts[GATE]);
        return 0; /* the neurons that their gate leaves out are zeros, and need no column */
    }
    for (int64_t t = 0; t < w->n; t++) {
        activate(sums[t], F, layer->activation);
        for (int64_t j = 0; j < F; j++) w->hidden[t * F + j] = layer->gated ? sums[t][j] * sums[t][F + j] : sums[t][j];
    }
    return -1;
}

static void add_chunk(const struct work *w)
{
    const struct layer *layer = w->layer;
    const float *read[w->n];
    float otherwise = hidden_of(w);
    for (int64_t t = 0; t < w->n; t++) read[t] = w->hidden + t * layer->width;
    site_product(w, HIDDEN, layer->down[w->expert], layer->hidden, read, layer->width, otherwise, w->scale, w->y, NULL);
}

/* y [T, H] += sum over assignments of weight * expert(x of its token); x [T, H] float32, offsets [E + 1].
 * `memory` holds chunk * (3F + H + max(H, F) + max R) + max(H, F) numbers of four bytes. */
void column_skip_layer(const struct layer *layer, int64_t experts, const float *x, const int64_t *token,
                       const int32_t *offsets, const float *weight, float *y, float *memory, struct count *counts)
{
    int64_t H = layer->hidden, F = layer->width, chunk = layer->chunk, widest = H > F ? H : F;
    const float *rows[chunk];
    float *sums[chunk];
    float *before = memory, *hidden = before + 2 * chunk * F, *used = hidden + chunk * F, *rest = used + chunk * H;
    float *bits = rest + chunk * widest;
    struct work work = {layer,  0,    0,    rows, NULL, sums, before, hidden, used, rest, bits + widest,
                        (uint32_t *)bits, counts};
    for (work.expert = 0; work.expert < experts; work.expert++) {
        for (int64_t start = offsets[work.expert]; start < offsets[work.expert + 1]; start += chunk) {
            int64_t left = offsets[work.expert + 1] - start;
            work.n = left < chunk ? left : chunk, work.scale = weight + start;
            for (int64_t t = 0; t < work.n; t++) {
                rows[t] = x + token[start + t] * H;
                sums[t] = y + token[start + t] * H;
            }
            add_chunk(&work);
        }
    }
}

/* Slots [T, K], padded with expert E, to assignments sorted by expert: token and weight [<= T * K], offsets [E + 1]. */
void column_skip_sort(const int64_t *indices, const float *weights, int64_t tokens, int64_t slots, int64_t experts,
                      int64_t *token, int32_t *offsets, float *weight)
{
    memset(offsets, 0, sizeof *offsets * (experts + 1));
    for (int64_t i = 0; i < tokens * slots; i++)
        if (indices[i] < experts) offsets[indices[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
    for (int64_t i = 0; i < tokens * slots; i++) {
        if (indices[i] >= experts) continue;
        int32_t place = offsets[indices[i]]++;
        token[place] = i / slots, weight[place] = weights[i];
    }
    memmove(offsets + 1, offsets, sizeof *offsets * experts); /* each now stands where the next expert begins */
    offsets[0] = 0;
}
