//! A store in memory that can be made to fail like an API server: conflicts, refusals, silence before and
//! after the deed. Each call is pending once, so that whoever polls decides the order of several callers.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use ipnet::IpNet;
use serde_json::Value;

use crate::block::{Block, cidr_of, name};
use crate::store::{Listing, Scope, Store, StoreError, Stored};

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It does not arrive.
    Lost,
    /// It is done, and the answer is lost.
    AnswerLost,
    /// The answer is no.
    Refused,
    /// Somebody else wrote first, without changing anything.
    Overtaken,
}

/// The objects behind all handles of one memory.
#[derive(Debug, Default)]
pub struct Memory {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, (u64, Value)>,
    version: u64,
    calls: u64,
}

impl Memory {
    /// One client of it, with its own faults.
    pub fn client(&self) -> Client<'_> {
        Client { memory: self, faults: Mutex::default() }
    }

    /// Puts any object there, as a hand edit would.
    pub fn put(&self, name: &str, spec: Value) {
        let mut inner = self.lock();
        inner.version += 1;
        let version = inner.version;
        inner.objects.insert(name.to_owned(), (version, spec));
    }

    /// Takes an object away, as a hand would.
    pub fn remove(&self, name: &str) {
        self.lock().objects.remove(name);
    }

    /// Every block that can be read.
    pub fn blocks(&self) -> Vec<Stored> {
        self.lock().listing(Scope::All).blocks
    }

    /// How many calls have arrived.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn listing(&self, scope: Scope<'_>) -> Listing {
        let mut listing = Listing::default();
        for (name, (version, spec)) in &self.objects {
            match Block::decode(name, spec) {
                Ok(block) => {
                    if matches!(scope, Scope::Node(node) if block.affinity.as_deref() != Some(node)) {
                        continue;
                    }
                    listing.blocks.push(Stored { block, version: version.to_string() });
                }
                Err(issue) => listing.issues.push(*issue),
            }
        }
        listing
    }

    fn write(&mut self, block: &Block) -> Result<Stored, StoreError> {
        let spec = serde_json::to_value(block.spec()).map_err(|e| StoreError::Refused(e.to_string()))?;
        self.version += 1;
        self.objects.insert(block.name(), (self.version, spec));
        Ok(Stored { block: block.clone(), version: self.version.to_string() })
    }

    fn check(&self, name: &str, version: &str) -> Result<(), StoreError> {
        match self.objects.get(name) {
            None => Err(StoreError::NotFound),
            Some((at, _)) if at.to_string() != version => Err(StoreError::Conflict),
            Some(_) => Ok(()),
        }
    }
}

/// One client of a [`Memory`].
pub struct Client<'a> {
    memory: &'a Memory,
    faults: Mutex<Faults>,
}

/// Decides the fate of each call.
type Faults = Option<Box<dyn FnMut() -> Option<Fault> + Send>>;

impl std::fmt::Debug for Client<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client<'_> {
    /// From now on `faults` is asked at each call.
    pub fn set_faults(&self, faults: impl FnMut() -> Option<Fault> + Send + 'static) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(faults));
    }

    fn fault(&self) -> Option<Fault> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|faults| faults())
    }

    async fn call<T>(
        &self,
        writes: bool,
        deed: impl FnOnce(&mut Inner) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        turn().await;
        let mut inner = self.memory.lock();
        inner.calls += 1;
        let silence = || Err(StoreError::Unavailable("no answer".to_owned()));
        match self.fault() {
            None => deed(&mut inner),
            Some(Fault::Lost) => silence(),
            Some(Fault::Refused) => Err(StoreError::Refused("forbidden".to_owned())),
            Some(Fault::AnswerLost) => {
                let _ = deed(&mut inner);
                silence()
            }
            Some(Fault::Overtaken) if writes => Err(StoreError::Conflict),
            Some(Fault::Overtaken) => deed(&mut inner),
        }
    }
}

/// Pending once.
fn turn() -> impl Future<Output = ()> + Send {
    let mut waited = false;
    std::future::poll_fn(move |context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
}

impl Store for Client<'_> {
    async fn prefixes(&self) -> Result<Vec<IpNet>, StoreError> {
        self.call(false, |inner| Ok(inner.objects.keys().filter_map(|name| cidr_of(name)).collect())).await
    }

    async fn list(&self, scope: Scope<'_>) -> Result<Listing, StoreError> {
        self.call(false, |inner| Ok(inner.listing(scope))).await
    }

    async fn get(&self, cidr: IpNet) -> Result<Stored, StoreError> {
        self.call(false, |inner| {
            let name = name(&cidr);
            let (version, spec) = inner.objects.get(&name).ok_or(StoreError::NotFound)?;
            let block = Block::decode(&name, spec).map_err(StoreError::Unreadable)?;
            Ok(Stored { block, version: version.to_string() })
        })
        .await
    }

    async fn create(&self, block: &Block) -> Result<Stored, StoreError> {
        self.call(true, |inner| {
            if inner.objects.contains_key(&block.name()) {
                return Err(StoreError::Conflict);
            }
            inner.write(block)
        })
        .await
    }

    async fn update(&self, block: &Block, version: &str) -> Result<Stored, StoreError> {
        self.call(true, |inner| {
            inner.check(&block.name(), version)?;
            inner.write(block)
        })
        .await
    }

    async fn delete(&self, cidr: IpNet, version: &str) -> Result<(), StoreError> {
        self.call(true, |inner| {
            let name = name(&cidr);
            inner.check(&name, version)?;
            inner.objects.remove(&name);
            Ok(())
        })
        .await
    }
}
