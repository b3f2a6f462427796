/* The C interface of the sampler: from the logits of a whole batch to tokens and log-probabilities.

   Its results are those of engine/sampling/sampler.py to the bit, on every instruction set: only single fp32 and fp64
   operations of IEEE 754 in a fixed order, and integer sums. A draw depends on its own row and fields alone.

   kvf_sample is stateless and thread-safe: calls that share neither `scratch` nor outputs may run side by side. */

#ifndef KVFERRY_SAMPLE_H
#define KVFERRY_SAMPLE_H

#include <stdint.h>

#include "kvferry.h"

#define KVF_MAX_DRAWS 4096
#define KVF_MAX_LOGPROBS 20
#define KVF_MAX_BIASES (1 << 16) /* of one draw; banned tokens too */

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint32_t token;
    float bias;
} kvf_bias;

/* Of the raw logits: before biases, bans, penalties and temperature. */
typedef struct {
    float logprob; /* of the drawn token */
    int32_t rank;  /* tokens whose logit is at least the drawn token's, itself included: 1 for the best */
    uint32_t top_tokens[KVF_MAX_LOGPROBS]; /* by (logit descending, id ascending); [num_logprobs] are set */
    float top_logprobs[KVF_MAX_LOGPROBS];
} kvf_logprobs;

typedef struct {
    double temperature; /* below 1e-5: greedy */
    double top_p;       /* above 0; 1 or more: no limit */
    double min_p;       /* 0 to 1 */
    uint64_t seed;
    uint32_t choice;
    uint32_t index;
    int32_t top_k; /* 0: no limit */
    float presence_penalty;
    float frequency_penalty;
    float repetition_penalty; /* above 0; 1: none */
    const uint32_t *tokens;   /* [num_tokens]: the prompt, then what was generated; read only with a penalty */
    int32_t num_tokens;
    int32_t num_prompt;
    const kvf_bias *biases; /* [num_biases] */
    const uint32_t *banned; /* [num_banned] */
    int32_t num_biases;
    int32_t num_banned;
    kvf_logprobs *logprobs; /* where log-probabilities go; NULL: none wanted */
    int32_t num_logprobs;   /* of the best tokens, beside the drawn one */
    int32_t reserved;       /* 0 */
    const uint32_t *allowed; /* [ceil(vocab_size / 32)]: bit t % 32 of word t / 32 says whether token t may be drawn,
                                and at least one may; NULL: every token may */
} kvf_draw;

/* Bytes of scratch memory of one call, whatever the number of draws. 0 for a vocabulary out of bounds. */
KVF_API uint64_t kvf_sample_scratch_bytes(int32_t vocab_size);

/* Draw one token for each row of `logits` [num_draws, vocab_size] into `tokens` [num_draws]. `scratch`: memory of
   the size above, aligned to 64, of any content. Fails only before it writes. */
KVF_API int32_t kvf_sample(const float *logits, int32_t num_draws, int32_t vocab_size, const kvf_draw *draws,
                           void *scratch, uint32_t *tokens);

/* The same with the model's vocabulary, on the model's threads and in scratch memory of its own; at the times at which
   kvf_step may be called. */
KVF_API int32_t kvf_model_sample(kvf_model *model, const float *logits, int32_t num_draws, const kvf_draw *draws,
                                 uint32_t *tokens);

/* How likely known tokens are: `logprobs` [num_rows] of `targets` [num_rows] (as of drawn ones), by the rows of `logits`
   [num_rows, vocab_size]. On the model's threads, at the times at which kvf_step may be called. */
KVF_API int32_t kvf_model_score(kvf_model *model, const float *logits, int32_t num_rows, const uint32_t *targets,
                                int32_t num_top, kvf_logprobs *logprobs);

#ifdef __cplusplus
}
#endif

#endif
