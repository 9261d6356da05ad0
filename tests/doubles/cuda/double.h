/* A double of NVIDIA's driver at its C ABI, over memory that processes share: see README.md. */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define CARDS 4
#define INSTANCES 2  /* of a partitioned card */
#define ALLOCATIONS 4096
#define BLOCK_BYTES (2ull << 20)
#define UUID_BYTES 16
#define CONTEXT(device) ((void *)(uintptr_t)(0xC0DE00 + (device)))

enum {  /* CUresult; source: cuda.h 12.9 */
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, DEVICE_UNAVAILABLE = 46, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_CONTEXT = 201, MAP_FAILED_ = 205, PEER_ACCESS_UNSUPPORTED = 217, INVALID_HANDLE = 400,
    ILLEGAL_ADDRESS = 700, PEER_ACCESS_ALREADY_ENABLED = 704, NOT_PERMITTED = 800,
};

/* What a process sees as a device: a card, or an instance of a partitioned card. */
struct device { int card, instance; };  /* instance: -1 for a whole card */

struct allocation {
    uint64_t base;  /* what callers see: no access */
    char *memory;   /* where the double reads and writes */
    uint64_t size;
    int device;
    bool is_import, is_mapped_kind;
    uint64_t block, offset;  /* the file that it lies in, and where; an import is a whole block */
    int exporter, opened;
};

extern pthread_mutex_t lock;
extern bool initialized;
extern int visible_count;
extern struct device visible[CARDS * INSTANCES];
extern struct allocation allocations[ALLOCATIONS];

void path_of(char *path, size_t size, const char *format, ...);
int violation(int code, const char *format, ...);
double fault(const char *name);
bool is_partitioned(int card);

int current(void);
void *current_context(void);
struct allocation *find(uint64_t address);
struct allocation *attach(int pid, uint64_t block, uint64_t size, bool is_fresh);
void detach(struct allocation *allocation);
