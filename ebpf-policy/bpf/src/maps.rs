//! The maps, and the verdict's view of them. Sizes are part of what an agent checks before it adopts pinned maps.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use margay_bpf::layout::{
    Addr, Address, Config, ConnKey, Connection, Count, CounterKey, Decision, Endpoint, FragmentKey,
    IdentityId, ServiceKey, SetKey, TableId, TableKey,
};
use margay_bpf::verdict;

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::with_max_entries(4096, 0);
#[map]
static ADDRESSES: HashMap<Addr, Address> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
static PREFIXES: LpmTrie<Addr, IdentityId> = LpmTrie::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
static SETS: HashMap<SetKey, TableId> = HashMap::with_max_entries(524_288, BPF_F_NO_PREALLOC);
#[map]
static TABLES: LpmTrie<TableKey, Decision> = LpmTrie::with_max_entries(524_288, BPF_F_NO_PREALLOC);
#[map]
static SERVICES: HashMap<ServiceKey, u32> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
static RANGES: LpmTrie<Addr, u32> = LpmTrie::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// The value is a [`Connection`], as plain words because a static must be `Sync`.
#[map]
static CONNECTIONS: LruHashMap<ConnKey, [u64; 3]> = LruHashMap::with_max_entries(131_072, 0);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, u64> = LruHashMap::with_max_entries(8192, 0);
#[map]
pub static COUNTERS: PerCpuHashMap<CounterKey, Count> =
    PerCpuHashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
/// Events that `EVENTS` had no room for.
#[map]
pub static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// The maps of the kernel.
pub struct Kernel;

const HOST: u32 = 128;

impl verdict::Policy for Kernel {
    #[inline(always)]
    fn endpoint(&self, ifindex: u32) -> Option<&Endpoint> {
        // SAFETY: entries are replaced, never written in place, and live until the program ends (RCU).
        unsafe { ENDPOINTS.get(&ifindex) }
    }

    #[inline(always)]
    fn address(&self, address: &Addr) -> Option<&Address> {
        // SAFETY: as above.
        unsafe { ADDRESSES.get(address) }
    }

    #[inline(always)]
    fn prefix(&self, address: &Addr) -> Option<IdentityId> {
        PREFIXES.get(&Key::new(HOST, *address)).copied()
    }

    #[inline(always)]
    fn table(&self, key: &SetKey) -> Option<TableId> {
        // SAFETY: as above.
        unsafe { SETS.get(key) }.copied()
    }

    #[inline(always)]
    fn decision(&self, key: &TableKey) -> Option<&Decision> {
        TABLES.get(&Key::new(TableKey::ONE_PORT, *key))
    }

    #[inline(always)]
    fn is_service(&self, key: &ServiceKey) -> bool {
        SERVICES.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn range(&self, address: &Addr) -> Option<u32> {
        RANGES.get(&Key::new(HOST, *address)).copied()
    }
}

impl verdict::Maps for Kernel {
    type Policy = Self;
    type Conn = &'static Connection;

    #[inline(always)]
    fn policy(&self) -> &Self {
        self
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: the helper has no precondition.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn revision(&self) -> u32 {
        CONFIG.get(0).map_or(0, |config| config.revision)
    }

    #[inline(always)]
    fn connection(&self, key: &ConnKey) -> Option<&'static Connection> {
        let words = CONNECTIONS.get_ptr(key)?;
        // SAFETY: three aligned words have the layout of a Connection, whose cells allow for changes from other CPUs; an element
        // that is evicted meanwhile may be reused for another flow, which then is judged once more at worst.
        Some(unsafe { &*words.cast::<Connection>() })
    }

    #[inline(always)]
    fn track(&self, key: &ConnKey, connection: &Connection) {
        // SAFETY: Connection is repr(C), 24 bytes without padding.
        let words = unsafe { &*core::ptr::from_ref(connection).cast::<[u64; 3]>() };
        // A failure costs the reply its way back, and the next packet tries again.
        let _ = CONNECTIONS.insert(key, words, 0);
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<u64> {
        // SAFETY: a torn read of one aligned word is not possible.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn note_fragment(&self, key: &FragmentKey, now: u64) {
        let _ = FRAGMENTS.insert(key, now, 0);
    }
}
