/* Which channels a token keeps: those whose score |x_j| * weight_j passes a threshold, or the largest. */
#ifndef MOEBENCH_RULES_H
#define MOEBENCH_RULES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A site without `active` keeps all. With `top` a token keeps so many, of equal scores the first; else `threshold`. */
struct site {
    int32_t active, by_expert; /* by_expert: whether `weight` is [E, channels] instead of [channels] */
    int64_t top, rank;
    const float *weight; /* NULL: one for every channel */
    const void *const *right; /* [E] columns [channels, R] of the low-rank part for what is left out, or NULL */
    const void *const *left;  /* [E] columns [R, outputs] of it */
    float threshold;
};

/* Which channels one chunk keeps: thresholds [n], and how many scores equal to them are still kept [n]. */
struct rule {
    const float *weight;
    float *threshold;
    int64_t *ties;
};

static inline float score_of(const struct rule *rule, float value, int64_t channel)
{
    if (!rule->weight) return fabsf(value);
    return rule->weight[channel] == 0 ? 0 : fabsf(value) * rule->weight[channel]; /* 0 times infinity is NaN */
}

/* Whether token t keeps a channel; asked once for each, in order. NaN is kept, so that it cannot vanish in silence,
 * but not in a channel of weight 0, which is left out whatever it holds. */
static inline int keeps(struct rule *rule, int64_t t, float value, int64_t channel)
{
    float score = score_of(rule, value, channel);
    if (score == rule->threshold[t] && rule->ties[t] > 0) return (int)(rule->ties[t]--, 1);
    return !(score <= rule->threshold[t]);
}

/* The `top`-th largest score as threshold, digit by digit: scores are not negative, so their bits have their order. */
static void find_top(struct rule *rule, int64_t t, const float *x, int64_t channels, int64_t top, uint32_t *bits)
{
    uint32_t found = 0, fixed = 0;
    int64_t left = top;
    for (int64_t j = 0; j < channels; j++) {
        float score = score_of(rule, x[j], j);
        memcpy(&bits[j], &score, sizeof score);
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t histogram[256] = {0}, digit = 255;
        for (int64_t j = 0; j < channels; j++)
            if ((bits[j] & fixed) == found) histogram[bits[j] >> shift & 255]++;
        while (digit > 0 && left > histogram[digit]) left -= histogram[digit--];
        found |= (uint32_t)digit << shift, fixed |= UINT32_C(255) << shift;
    }
    memcpy(&rule->threshold[t], &found, sizeof found);
    rule->ties[t] = left;
}

/* Make the rule of a site for a chunk; a site that keeps all has threshold `otherwise`. */
static void set_rule(struct rule *rule, const struct site *site, int64_t expert, const float *const *x, int64_t n,
                     int64_t channels, float otherwise, uint32_t *bits)
{
    rule->weight = !site->active || !site->weight ? NULL : site->weight + (site->by_expert ? expert * channels : 0);
    for (int64_t t = 0; t < n; t++) {
        rule->threshold[t] = site->active ? site->threshold : otherwise, rule->ties[t] = 0;
        if (site->active && site->top > 0 && site->top < channels) find_top(rule, t, x[t], channels, site->top, bits);
        else if (site->active && site->top > 0) rule->threshold[t] = -1;
    }
}

#endif
