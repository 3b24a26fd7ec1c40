/* One rank's paged KV cache, as mmdist/engine/pages.py lays it out. */
#ifndef MMDIST_PAGES_H
#define MMDIST_PAGES_H

#include <stdint.h>

typedef struct {
    void *k, *v;                /* (layers, blocks, kv_heads, block_size, head_dim): bfloat16, or int8 beside scales */
    float *k_scales, *v_scales; /* (layers, blocks, kv_heads, block_size); NULL for bfloat16 */
    int64_t blocks, kv_heads, block_size, head_dim;
} Pages;

/* Which vector of a layer's keys (or values) is that of a token's first KV head; the next head's is block_size later.
   slot: block * block_size + place in the block. */
static inline int64_t first_vector(const Pages *pages, int64_t slot)
{
    return slot / pages->block_size * pages->kv_heads * pages->block_size + slot % pages->block_size;
}

static inline int64_t layer_vectors(const Pages *pages)
{
    return pages->blocks * pages->kv_heads * pages->block_size;
}

#endif
