//! Maps that mirror compiled state: what is in the kernel, and how to bring it to what is wanted.

use std::collections::BTreeMap;

use aya::Pod;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError};
use margay_bpf::layout::{Addr, TableKey};

use crate::compile::{Prefix, TablePrefix};
use crate::error::Error;

/// One kind of map, as far as mirroring needs it.
pub(crate) trait Store<K, V> {
    fn load(&self) -> Result<BTreeMap<K, V>, MapError>;
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    fn delete(&mut self, key: &K) -> Result<(), MapError>;
}

impl<K: Pod + Ord, V: Pod> Store<K, V> for HashMap<MapData, K, V> {
    fn load(&self) -> Result<BTreeMap<K, V>, MapError> {
        self.iter().collect()
    }
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.insert(key, value, 0)
    }
    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.remove(key)
    }
}

impl<V: Pod> Store<u32, V> for Array<MapData, V> {
    fn load(&self) -> Result<BTreeMap<u32, V>, MapError> {
        (0..self.len()).map(|index| Ok((index, self.get(&index, 0)?))).collect()
    }
    fn put(&mut self, key: &u32, value: &V) -> Result<(), MapError> {
        self.set(*key, *value, 0)
    }
    /// An array's elements are always there.
    fn delete(&mut self, _: &u32) -> Result<(), MapError> {
        Ok(())
    }
}

/// A key of a longest-prefix-match map.
pub(crate) trait LpmKey: Copy + Ord {
    type Data: Pod;
    fn to_key(self) -> Key<Self::Data>;
    fn from_key(key: Key<Self::Data>) -> Self;
}

impl LpmKey for Prefix {
    type Data = Addr;
    fn to_key(self) -> Key<Addr> {
        Key::new(self.length, self.address)
    }
    fn from_key(key: Key<Addr>) -> Self {
        Self { length: key.prefix_len(), address: key.data() }
    }
}

impl LpmKey for TablePrefix {
    type Data = TableKey;
    fn to_key(self) -> Key<TableKey> {
        Key::new(self.length, self.key)
    }
    fn from_key(key: Key<TableKey>) -> Self {
        Self { length: key.prefix_len(), key: key.data() }
    }
}

impl<K: LpmKey, V: Pod> Store<K, V> for LpmTrie<MapData, K::Data, V> {
    fn load(&self) -> Result<BTreeMap<K, V>, MapError> {
        self.iter().map(|entry| entry.map(|(key, value)| (K::from_key(key), value))).collect()
    }
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.insert(&key.to_key(), value, 0)
    }
    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.remove(&key.to_key())
    }
}

/// A map and what we know to be in it.
pub(crate) struct Mirror<K, V> {
    name: &'static str,
    store: Box<dyn Store<K, V> + Send>,
    pub(crate) current: BTreeMap<K, V>,
}

impl<K: Ord + Copy, V: PartialEq + Copy> Mirror<K, V> {
    /// Reads what an earlier agent left in the map.
    pub(crate) fn open(name: &'static str, store: impl Store<K, V> + Send + 'static) -> Result<Self, Error> {
        let current = store.load().map_err(|source| Error::map("read", name, source))?;
        Ok(Self { name, store: Box::new(store), current })
    }

    pub(crate) fn put(&mut self, key: K, value: V) -> Result<(), Error> {
        self.store.put(&key, &value).map_err(|source| Error::map("write to", self.name, source))?;
        self.current.insert(key, value);
        Ok(())
    }

    fn delete(&mut self, key: K) -> Result<(), Error> {
        match self.store.delete(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(source) => return Err(Error::map("remove from", self.name, source)),
        }
        self.current.remove(&key);
        Ok(())
    }

    /// Writes what is missing or different, the greatest key first: for prefixes, the longest. A short prefix that came first
    /// would for a moment speak for a longer one inside it.
    pub(crate) fn write(&mut self, wanted: &BTreeMap<K, V>) -> Result<usize, Error> {
        let changed: Vec<_> = wanted
            .iter()
            .rev()
            .filter(|(key, value)| self.current.get(key) != Some(value))
            .map(|(key, value)| (*key, *value))
            .collect();
        for (key, value) in &changed {
            self.put(*key, *value)?;
        }
        Ok(changed.len())
    }

    /// Removes what is not wanted any more, the smallest key first, for the same reason.
    pub(crate) fn sweep(&mut self, wanted: &BTreeMap<K, V>) -> Result<usize, Error> {
        let stale: Vec<_> = self.current.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in &stale {
            self.delete(*key)?;
        }
        Ok(stale.len())
    }
}
