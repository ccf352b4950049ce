/* The guest of `heddle bench machine`: integer work as programs do it, or naps.
 *
 * An iteration hashes a text with a table, multiplies matrices, gives a linked list new keys,
 * sorts and walks it, and scans the text with a state machine. Every result goes into one
 * checksum, which is printed. cli/src/bench/machine/compute.rs has the same in Rust. */

typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define UART (*(volatile u8 *)0x10000000UL)
#define TEST (*(volatile u32 *)0x100000UL)
#define MTIMECMP (*(volatile u64 *)0x2004000UL)
#define MTIME (*(volatile u64 *)0x200bff8UL)
#define TICKS 10000000UL /* of the timer, a second */
#define MTIE 128UL       /* in mie */

#define TEXT 4096
#define SIDE 16
#define NODES 256
#define EDITS 16

/* bench-start.S has them at a fixed offset, where they are patched. */
extern volatile u64 parameters[3];

static u64 seed;

static u64 draw(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static u64 mix(u64 sum, u64 value) {
    sum = (sum ^ value) * 0x9e3779b97f4a7c15UL;
    return sum ^ sum >> 29;
}

/* ---- a table: CRC-32 of the text ---- */
static const u8 alphabet[32] = "0123456789 loom heddle. weft. +\n";
static u8 text[TEXT];
static u32 table[256];

static u32 crc(u32 crc) {
    crc = ~crc;
    for (u32 i = 0; i < TEXT; i++) crc = table[(crc ^ text[i]) & 255] ^ crc >> 8;
    return ~crc;
}

/* ---- matrices ---- */
static u32 left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];

static u32 multiply(void) {
    u32 sum = 0;
    for (u32 i = 0; i < SIDE; i++)
        for (u32 j = 0; j < SIDE; j++) {
            u32 cell = 0;
            for (u32 k = 0; k < SIDE; k++) cell += left[i][k] * right[k][j];
            product[i][j] = cell;
            sum = sum * 31 + cell;
        }
    for (u32 i = 0; i < SIDE; i++)
        for (u32 j = 0; j < SIDE; j++) left[i][j] = left[i][j] * 5 + product[j][i];
    return sum;
}

/* ---- a linked list ---- */
struct node {
    struct node *next;
    u64 key;
};
static struct node nodes[NODES], *list;

static struct node *merge(struct node *a, struct node *b) {
    struct node head = {0, 0}, *tail = &head;
    while (a && b) {
        if (a->key <= b->key) {
            tail->next = a;
            a = a->next;
        } else {
            tail->next = b;
            b = b->next;
        }
        tail = tail->next;
    }
    tail->next = a ? a : b;
    return head.next;
}

static struct node *sort(struct node *all) {
    if (!all || !all->next) return all;
    struct node *middle = all, *end = all->next;
    while (end && end->next) {
        middle = middle->next;
        end = end->next->next;
    }
    struct node *rest = middle->next;
    middle->next = 0;
    struct node *front = sort(all);
    return merge(front, sort(rest));
}

static u64 walk(void) {
    for (struct node *node = list; node; node = node->next)
        node->key = node->key * 6364136223846793005UL + 1442695040888963407UL;
    list = sort(list);
    u64 sum = 0;
    for (struct node *node = list; node; node = node->next) sum = sum * 31 + (node->key >> 7 ^ (u64)(node - nodes));
    return sum;
}

/* ---- a state machine: words, numbers and fractions of the text ---- */
enum state { GAP, WORD, NUMBER, FRACTION, BAD, STATES };
enum kind { DIGIT, LETTER, DOT, SPACE, OTHER };
static u64 number, total, seen[STATES];

static enum kind kind(u8 byte) {
    if (byte >= '0' && byte <= '9') return DIGIT;
    if (byte >= 'a' && byte <= 'z') return LETTER;
    return byte == '.' ? DOT : byte == ' ' ? SPACE : OTHER;
}

static enum state in_gap(u8 byte) {
    switch (kind(byte)) {
    case DIGIT: number = byte - '0'; return NUMBER;
    case LETTER: return WORD;
    case SPACE: return GAP;
    default: return BAD;
    }
}

static enum state in_word(u8 byte) {
    switch (kind(byte)) {
    case DIGIT:
    case LETTER: return WORD;
    case DOT:
    case SPACE: return GAP;
    default: return BAD;
    }
}

static enum state in_number(u8 byte) {
    switch (kind(byte)) {
    case DIGIT: number = number * 10 + (byte - '0'); return NUMBER;
    case LETTER: return WORD;
    case DOT: return FRACTION;
    case SPACE: total += number % 9973; return GAP;
    default: return BAD;
    }
}

static enum state in_fraction(u8 byte) {
    switch (kind(byte)) {
    case DIGIT: number = number * 10 + (byte - '0'); return FRACTION;
    case SPACE: total += number / 7; return GAP;
    default: return BAD;
    }
}

static enum state in_bad(u8 byte) { return kind(byte) == SPACE ? GAP : BAD; }

static enum state (*const volatile step[STATES])(u8) = {in_gap, in_word, in_number, in_fraction, in_bad};

static u64 scan(void) {
    enum state state = GAP;
    for (u32 i = 0; i < TEXT; i++) {
        seen[state]++;
        state = step[state](text[i]);
    }
    u64 sum = total;
    for (u32 i = 0; i < STATES; i++) sum = sum * 31 + seen[i];
    return sum;
}

static void prepare(void) {
    seed = 0x6865646c65;
    for (u32 i = 0; i < 256; i++) {
        u32 crc = i;
        for (u32 bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ 0xedb88320 : crc >> 1;
        table[i] = crc;
    }
    for (u32 i = 0; i < TEXT; i++) text[i] = alphabet[draw() & 31];
    for (u32 i = 0; i < SIDE; i++)
        for (u32 j = 0; j < SIDE; j++) {
            left[i][j] = draw();
            right[i][j] = draw();
        }
    for (u32 i = 0; i < NODES; i++) {
        /* Odd, so that each comes once, far from the one before. */
        struct node *node = &nodes[i * 167 % NODES];
        node->key = draw();
        node->next = list;
        list = node;
    }
}

static u64 compute(u64 iterations) {
    u64 sum = 0;
    prepare();
    for (u64 i = 0; i < iterations; i++) {
        sum = mix(sum, crc(i));
        sum = mix(sum, multiply());
        sum = mix(sum, walk());
        sum = mix(sum, scan());
        for (u32 edit = 0; edit < EDITS; edit++) {
            u64 at = draw() % TEXT;
            text[at] = alphabet[draw() & 31];
        }
    }
    return sum;
}

static void nap(void) {
    u64 until = MTIME + TICKS;
    MTIMECMP = until;
    /* Interrupts stay off: the timer only ends the wait. */
    asm volatile("csrs mie, %0" ::"r"(MTIE));
    while (MTIME < until) asm volatile("wfi");
}

void main(void) {
    u64 sum = compute(parameters[0]);
    for (u64 i = 0; i < parameters[1]; i++) nap();
    for (const char *c = "checksum "; *c; c++) UART = *c;
    for (int at = 60; at >= 0; at -= 4) UART = "0123456789abcdef"[sum >> at & 15];
    UART = '\n';
    TEST = 0x5555;
    for (;;) {}
}
