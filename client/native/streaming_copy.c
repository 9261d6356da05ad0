/* Copies large ranges of memory past the caches of the processor, and digests them on the way.
 *
 * A weight set is larger than any cache, and nobody reads what has been written before all of it is there. memmove
 * writes through the caches all the same, unless a range is longer than a limit that its C library derives from the
 * size of the caches: tens or hundreds of megabytes, far more than most tensors have. Every line of the destination is
 * fetched then before it is overwritten. Streaming stores write whole lines and fetch none. Four pages at a time keep
 * several pages of memory open, as C libraries do beyond that limit.
 *
 * Each unit is digested while the first-level cache has it, right before it is copied.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define EXPORTED __attribute__((visibility("default")))

enum { INTERFACE = 1, LINE_BYTES = 64, PAGE_BYTES = 4096, PAGES = 4, UNIT_BYTES = PAGES * PAGE_BYTES };

/* libxxhash's streaming interface to XXH3, wherever the caller found it. */
struct xxh3 {
    void *(*create_state)(void);
    int (*free_state)(void *state);
    int (*reset)(void *state);
    int (*update)(void *state, const void *input, size_t size);
    uint64_t (*digest)(const void *state);
};

/* One unit; `to` is at the beginning of a line. */
static void copy_unit(char *restrict to, const char *restrict from)
{
#if defined(__SSE2__)
    for (size_t line = 0; line < PAGE_BYTES; line += LINE_BYTES) {
        for (size_t offset = line; offset < UNIT_BYTES; offset += PAGE_BYTES) {
            const __m128i *source = (const __m128i *)(from + offset);
            __m128i *destination = (__m128i *)(to + offset);
            /* A hint: where nothing is mapped it does nothing. */
            _mm_prefetch(from + offset + UNIT_BYTES, _MM_HINT_T0);
            __m128i first = _mm_loadu_si128(source), second = _mm_loadu_si128(source + 1);
            __m128i third = _mm_loadu_si128(source + 2), fourth = _mm_loadu_si128(source + 3);
            _mm_stream_si128(destination, first);
            _mm_stream_si128(destination + 1, second);
            _mm_stream_si128(destination + 2, third);
            _mm_stream_si128(destination + 3, fourth);
        }
    }
#else
    memcpy(to, from, UNIT_BYTES);
#endif
}

static void copy_block(char *to, const char *from, size_t size, const struct xxh3 *xxh3, void *state)
{
    size_t head = -(uintptr_t)to % LINE_BYTES, done = 0;
    if (size >= head + UNIT_BYTES) {
        memcpy(to, from, head);
        if (xxh3)
            xxh3->update(state, from, head);
        for (done = head; size - done >= UNIT_BYTES; done += UNIT_BYTES) {
            if (xxh3)
                xxh3->update(state, from + done, UNIT_BYTES);
            copy_unit(to + done, from + done);
        }
    }
    memcpy(to + done, from + done, size - done);
    if (xxh3)
        xxh3->update(state, from + done, size - done);
}

/* Streaming stores become visible to other processors in any order until then. */
static void settle(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

EXPORTED int weight_broker_copy_interface(void)
{
    return INTERFACE;
}

/* The ranges must not overlap. */
EXPORTED void weight_broker_copy(char *to, const char *from, size_t size)
{
    copy_block(to, from, size, NULL, NULL);
    settle();
}

/* Leaves the digest of each block of `block_bytes`, the last of which may be shorter, in `digests`. Returns 0, or -1
 * if there was no memory: then nothing was copied. */
EXPORTED int weight_broker_copy_and_digest(char *to, const char *from, size_t size, size_t block_bytes,
                                           const struct xxh3 *xxh3, uint64_t *digests)
{
    void *state = xxh3->create_state();
    if (!state)
        return -1;
    for (size_t offset = 0; offset < size; offset += block_bytes) {
        size_t left = size - offset;
        xxh3->reset(state);
        copy_block(to + offset, from + offset, left < block_bytes ? left : block_bytes, xxh3, state);
        *digests++ = xxh3->digest(state);
    }
    xxh3->free_state(state);
    settle();
    return 0;
}
