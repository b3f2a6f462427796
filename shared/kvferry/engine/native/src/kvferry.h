/* The C interface of the native engine: what Python binds through ctypes. Plain C, fixed-width types.

   Life of a model:

       kvf_model_create -> kvf_model_load (each weight) -> kvf_model_finish -> kvf_model_set_cache
       -> kvf_step ... (one call is one engine step) -> kvf_model_free

   Ranks. A model may be split over several of these, each with a part of every weight and the KV of its own heads:
   processes on one host, or threads. They share one piece of memory (kvf_model_join) and take each step together: all
   call kvf_step with the same sequences, and none returns before every rank has written its KV. A step of a rank whose
   partners never come waits for ever (asleep, not spinning): whoever starts ranks ends all of them when one dies.
   Every output is summed by one rank, over all of k in the order of a model that is whole. So the bits do not depend
   on the number of ranks.

   Threads. kvf_step, and whatever creates, loads or frees, may be called by one thread at a time. kvf_gather,
   kvf_scatter and kvf_copy_blocks may run on other threads (or in other processes that have mapped the cache) beside a
   step and beside each other, as long as
   no two of them (or one and the step) touch the same block and one of the two writes; but kvf_gather may read
   positions of a block whose later positions the step writes.

   Errors. Every function that returns int32_t returns 0 or a negative KVF_E_ code and has then changed nothing
   (kvf_step fails only before it writes; running out of memory included). No function throws or aborts.

   bf16 values travel as uint16_t, the upper half of an fp32. All matrices are row-major. */

#ifndef KVFERRY_H
#define KVFERRY_H

#include <stdint.h>

#define KVF_API __attribute__((visibility("default")))

#define KVF_ABI 6 /* of every struct and signature in this file and in sample.h */

/* Bounds of what is accepted. */
#define KVF_MAX_LAYERS 1024
#define KVF_MAX_WIDTH (1 << 16)     /* hidden, intermediate, heads * head_dim: what a linear layer sums over */
#define KVF_MAX_DIMENSION (1 << 22) /* vocabulary */
#define KVF_MAX_HEAD_DIM 512
#define KVF_MAX_LEN (1 << 20) /* positions */
#define KVF_MAX_BLOCK_SIZE 4096
#define KVF_MAX_THREADS 256
#define KVF_MAX_RANKS 64
#define KVF_BARRIER_BYTES 256
#define KVF_MAX_SEQUENCES 4096 /* of one step */
#define KVF_MAX_STEP_ROWS (1 << 17)
#define KVF_PAGE_TOKENS 16 /* block_size must be a multiple */

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KVF_OK = 0,
    KVF_E_ARGUMENT = -1, /* a null pointer, or a number outside its bounds */
    KVF_E_SHAPE = -2,    /* a shape that the engine can't run, or rows that don't fit the weight */
    KVF_E_STATE = -3,    /* called out of order: a step without weights or cache, a load after finish; kvf_may_run is 0 */
    KVF_E_MISSING = -4,  /* finish: a weight was not loaded whole */
    KVF_E_MEMORY = -5,   /* out of memory, or threads could not be started */
    KVF_E_EMPTY = -6,    /* a sequence without rows, a piece without content */
    KVF_E_POSITION = -7, /* positions beyond max_len or beyond the block table */
    KVF_E_BLOCK = -8,    /* a block outside the cache */
    KVF_E_TOKEN = -9     /* a token outside the vocabulary */
};

enum { KVF_BF16 = 0, KVF_INT8 = 1 }; /* kvf_shape.quantization */

typedef struct {
    int32_t begin, end;
} kvf_range;

typedef struct {
    int32_t num_layers;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t num_heads;
    int32_t num_kv_heads; /* divides num_heads */
    int32_t head_dim;     /* even */
    int32_t vocab_size;
    int32_t max_len;      /* positions; length of the cos and sin tables */
    int32_t block_size;   /* tokens of a KV block, a multiple of KVF_PAGE_TOKENS */
    int32_t quantization; /* KVF_BF16 or KVF_INT8 */
    int32_t tied;         /* 1: the head is the embedding; HEAD is not loaded */
    int32_t qkv_bias;     /* 1: QKV_BIAS must be loaded, and so on; 0: it must not be */
    int32_t output_bias;
    int32_t mlp_bias; /* gate, up and down */
    int32_t qk_norm;
    int32_t threads; /* of a step, the caller's included */
    float rms_norm_eps;
    /* What this rank has of a model that is split; all zero: everything. No range is empty. Ranks together have all of
       each dimension once, but for kv_heads: they are those that `heads` read, and one that the queries of several
       ranks read is in each of them. */
    int32_t ranks;
    int32_t rank;
    int32_t max_rows;       /* of one step, for memory that is shared; nothing if the model is whole */
    kvf_range heads;        /* query heads; rows of Q, columns of what attention returns */
    kvf_range kv_heads;     /* heads of its KV cache; if there are several, `heads` are all that read them */
    kvf_range hidden;       /* rows of OUTPUT and DOWN */
    kvf_range intermediate; /* rows of GATE and UP */
    kvf_range vocab;        /* rows of EMBEDDING and HEAD */
} kvf_shape;

/* Weights. [n, k] is what the whole weight has; rows may come in any number of calls of any row range. A rank of a split
   model has those rows of each that its ranges tell, counted from its first one, and all of the norms. */
enum {
    KVF_EMBEDDING = 0,   /* [vocab, hidden]; no layer (pass 0), as NORM and HEAD */
    KVF_INPUT_NORM = 1,  /* [hidden, 1], and so are all norms and biases: k is 1 */
    KVF_QKV = 2,         /* [(heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v */
    KVF_QKV_BIAS = 3,    /* [(heads + 2 * kv_heads) * head_dim, 1] */
    KVF_Q_NORM = 4,      /* [head_dim, 1] */
    KVF_K_NORM = 5,      /* [head_dim, 1] */
    KVF_OUTPUT = 6,      /* [hidden, heads * head_dim] */
    KVF_OUTPUT_BIAS = 7, /* [hidden, 1] */
    KVF_POST_NORM = 8,   /* [hidden, 1] */
    KVF_GATE = 9,        /* [intermediate, hidden] */
    KVF_UP = 10,         /* [intermediate, hidden] */
    KVF_GATE_BIAS = 11,  /* [intermediate, 1] */
    KVF_UP_BIAS = 12,    /* [intermediate, 1] */
    KVF_DOWN = 13,       /* [hidden, intermediate] */
    KVF_DOWN_BIAS = 14,  /* [hidden, 1] */
    KVF_NORM = 15,       /* [hidden, 1] */
    KVF_HEAD = 16,       /* [vocab, hidden], of an untied model */
    KVF_NUM_WEIGHTS = 17
};

typedef struct kvf_model kvf_model;

enum { KVF_NO_LOGITS = 0, KVF_LAST_LOGITS = 1, KVF_ALL_LOGITS = 2 }; /* kvf_sequence.logits */

typedef struct {
    const uint32_t *tokens;     /* [num_rows] */
    const int32_t *block_table; /* [num_blocks], by position */
    int32_t num_rows;           /* at least 1 */
    int32_t start;              /* position of the first row; KV before it is in the blocks already */
    int32_t num_blocks;         /* enough for start + num_rows positions */
    int32_t logits;             /* which rows' logits are wanted */
} kvf_sequence;

/* A rectangle of one sequence's KV: half-open ranges. */
typedef struct {
    int32_t layer_start, layer_end;
    int32_t token_start, token_end;
    int32_t head_start, head_end; /* KV heads, counted from the first one of the cache */
    /* The frame may have more heads than this cache: how many, and which of them is head_start. 0, 0: these alone. */
    int32_t frame_heads, frame_head;
} kvf_piece;

/* Where KV lies: of this rank, or of another one whose memory is mapped. */
typedef struct {
    const kvf_shape *shape; /* of the rank whose KV it is */
    void *memory;           /* as kvf_model_set_cache got it */
    int32_t num_blocks;
} kvf_cache;

/* "amx", "avx512", "avx2" or "portable": what this library was compiled for. */
KVF_API const char *kvf_isa(void);
KVF_API uint32_t kvf_abi(void);
/* Before the first model: asks the kernel for what the instruction set needs beyond the processor. 0 where it refuses. */
KVF_API int32_t kvf_may_run(void);
KVF_API const char *kvf_error_text(int32_t code);

/* A model without weights; its threads are started. `windows` [num_layers] counts the attended positions, the
   own one included, 0: all. `cos` and `sin` [max_len, head_dim / 2] hold values that bf16 can represent, any
   attention factor included. Everything is copied. NULL on error, with the code in `*error` (may be NULL). */
KVF_API kvf_model *kvf_model_create(const kvf_shape *shape, const int32_t *windows, const float *cos, const float *sin,
                                    int32_t *error);
/* Copy (pack, quantise) rows [first_row, first_row + n) of a weight; `rows` [n, k] bf16 may be freed afterwards. */
KVF_API int32_t kvf_model_load(kvf_model *model, int32_t weight, int32_t layer, const uint16_t *rows, int32_t n,
                               int32_t k, int32_t first_row);
/* Checks that everything was loaded. */
KVF_API int32_t kvf_model_finish(kvf_model *model);
KVF_API void kvf_model_free(kvf_model *model); /* NULL is allowed. The cache memory stays the caller's. */

KVF_API uint64_t kvf_model_weight_bytes(const kvf_model *model);
/* Scratch memory as it stands: grows to the largest step and is reused. */
KVF_API uint64_t kvf_model_workspace_bytes(const kvf_model *model);

/* 0 for a shape or count out of bounds. */
KVF_API uint64_t kvf_cache_bytes(const kvf_shape *shape, int32_t num_blocks);
/* `memory`: kvf_cache_bytes bytes, aligned to 64, that outlive the model's last use. Any content will do. */
KVF_API int32_t kvf_model_set_cache(kvf_model *model, void *memory, int32_t num_blocks);

/* Ranks of a split model, before their first step: `memory` is what all of them share, kvf_shared_bytes long, aligned to
   64, zero before the first one joined, and outlives the model's last use. 0 bytes for a model that is whole. */
KVF_API uint64_t kvf_shared_bytes(const kvf_shape *shape);
KVF_API int32_t kvf_model_join(kvf_model *model, void *memory);
/* Returns when `ranks` have called it; what they wrote before is then visible to all. For ranks that compute by other
   means: `state` is KVF_BARRIER_BYTES that they share, aligned to 64, zero before the first call. */
KVF_API int32_t kvf_barrier(void *state, int32_t ranks);

/* One engine step: writes the KV of all rows and computes the wanted logits, [wanted rows, vocab_size] fp32 in the
   order of sequences and rows, each rounded to bf16. `logits` may be NULL: then no logits are computed, and those of
   the wanted rows can be had from kvf_logits. A block that a sequence writes may not be named by another sequence of
   the step. Ranks but the first get no logits: there any pointer says that they are to be computed. */
KVF_API int32_t kvf_step(kvf_model *model, const kvf_sequence *sequences, int32_t num_sequences, float *logits);
/* The same logits, of the last step's wanted rows [first, first + count) alone: for more rows than there is memory
   for. `logits` [count, vocab_size]. All ranks call it, or none. */
KVF_API int32_t kvf_logits(kvf_model *model, int32_t first, int32_t count, float *logits);

/* Copy a piece between blocks and a frame [layers, 2 (K, V), tokens, heads, head_dim] of bf16, which may have any
   alignment. `frame_bytes` must be exactly the size of the whole frame; other heads in it are left alone. Of several
   ranks all caches are given at once, [count], and what each has of the piece, which differs in the heads alone. */
KVF_API int32_t kvf_gather(const kvf_cache *caches, const kvf_piece *pieces, int32_t count, const int32_t *block_table,
                           int32_t num_blocks, void *frame, uint64_t frame_bytes);
KVF_API int32_t kvf_scatter(const kvf_cache *caches, const kvf_piece *pieces, int32_t count, const int32_t *block_table,
                            int32_t num_blocks, const void *frame, uint64_t frame_bytes);
/* Copy whole blocks (all layers): `pairs` [count, 2] of (from, to). Pairs are done in order. */
KVF_API int32_t kvf_copy_blocks(const kvf_cache *cache, const int32_t *pairs, int32_t count);

/* Seconds that the steps since the last call spent in each stage, as thread 0 sees it (waiting for the others
   included), into `seconds` [KVF_NUM_STAGES]. The first call turns the measurement on. */
enum {
    KVF_STAGE_EMBED = 0,
    KVF_STAGE_NORM = 1,
    KVF_STAGE_QKV = 2,
    KVF_STAGE_ROPE = 3, /* QK norm and writing KV included */
    KVF_STAGE_ATTENTION = 4,
    KVF_STAGE_OUTPUT = 5,
    KVF_STAGE_GATE_UP = 6,
    KVF_STAGE_DOWN = 7,
    KVF_STAGE_HEAD = 8,
    KVF_NUM_STAGES = 9
};
KVF_API int32_t kvf_model_profile(kvf_model *model, double *seconds);

#ifdef __cplusplus
}
#endif

#endif
