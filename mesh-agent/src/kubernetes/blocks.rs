//! IPBlocks in the API server: compare-and-swap by `resourceVersion`.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use kube::api::{DeleteParams, DynamicObject, ListParams, PostParams, Preconditions};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use mesh_ipam::block::{Block, cidr_of, name};
use mesh_ipam::object::{GROUP, VERSION};
use mesh_ipam::store::{Listing, Scope, Store, StoreError, Stored};
use serde_json::Value;
use tokio::time::timeout;

use super::MANAGER;
use super::client::chain;
use crate::store;

/// Objects a page: a block of 4096 addresses is large.
const PAGE: u32 = 100;
/// For an answer. A pod may wait for it.
const ANSWERED: Duration = Duration::from_secs(10);

/// The blocks. Each is read from the API server itself; only which are this node's is known from the watch, so that a round
/// asks for these few and for no list of all.
#[derive(Clone, Debug)]
pub struct ApiBlocks {
    inner: std::sync::Arc<Inner>,
}

struct Inner {
    api: Api<DynamicObject>,
    resource: ApiResource,
    store: store::Store,
    /// Written by us, and perhaps not heard of yet.
    written: Mutex<BTreeSet<IpNet>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiBlocks").finish_non_exhaustive()
    }
}

impl ApiBlocks {
    /// Over this connection; `store` has what the watch heard.
    pub fn new(client: Client, store: store::Store) -> Self {
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, "IPBlock"), "ipblocks");
        let api = Api::all_with(client, &resource);
        Self { inner: std::sync::Arc::new(Inner { api, resource, store, written: Mutex::default() }) }
    }

    fn object(&self, block: &Block, version: Option<&str>) -> Result<DynamicObject, StoreError> {
        let spec = serde_json::to_value(block.spec()).map_err(|e| StoreError::Refused(e.to_string()))?;
        let mut object = DynamicObject::new(&block.name(), &self.inner.resource);
        object.metadata.resource_version = version.map(str::to_owned);
        object.data = serde_json::json!({ "spec": spec });
        Ok(object)
    }

    fn remember(&self, cidr: IpNet, is_there: bool) {
        let mut written = self.inner.written.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = if is_there { written.insert(cidr) } else { written.remove(&cidr) };
    }

    /// As heard, and as written of late: a block made a moment ago is used up before another is made.
    fn of_node(&self, node: &str) -> BTreeSet<IpNet> {
        let snapshot = self.inner.store.current();
        let written = self.inner.written.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot.cluster.ipam.blocks_of(node).chain(written.iter().copied()).collect()
    }
}

fn params() -> PostParams {
    PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
}

async fn answered<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, StoreError> {
    match timeout(ANSWERED, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(problem(&error)),
        Err(_) => Err(StoreError::Unavailable(format!("no answer within {} s", ANSWERED.as_secs()))),
    }
}

/// What an error says of whether it was done.
fn problem(error: &kube::Error) -> StoreError {
    match error {
        kube::Error::Api(status) => match status.code {
            404 => StoreError::NotFound,
            409 => StoreError::Conflict,
            400 | 403 | 405 | 422 => StoreError::Refused(status.message.clone()),
            _ => StoreError::Unavailable(status.message.clone()),
        },
        _ => StoreError::Unavailable(chain(error)),
    }
}

fn read(object: DynamicObject) -> Result<Stored, StoreError> {
    let (name, version) = (object.metadata.name, object.metadata.resource_version);
    let spec = object.data.get("spec").unwrap_or(&Value::Null);
    let block = Block::decode(&name.unwrap_or_default(), spec).map_err(StoreError::Unreadable)?;
    Ok(Stored { block, version: version.unwrap_or_default() })
}

impl Store for ApiBlocks {
    async fn prefixes(&self) -> Result<Vec<IpNet>, StoreError> {
        let mut out = Vec::new();
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let answer = answered(self.inner.api.list_metadata(&page)).await?;
            out.extend(answer.items.iter().filter_map(|item| cidr_of(item.metadata.name.as_deref()?)));
            match answer.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page.continue_token = Some(token),
                None => return Ok(out),
            }
        }
    }

    async fn list(&self, scope: Scope<'_>) -> Result<Listing, StoreError> {
        let mut out = Listing::default();
        let mut take = |read: Result<Stored, StoreError>| match read {
            Ok(stored) => {
                out.blocks.push(stored);
                Ok(())
            }
            Err(StoreError::Unreadable(issue)) => {
                out.issues.push(*issue);
                Ok(())
            }
            Err(error) => Err(error),
        };
        match scope {
            Scope::Node(node) => {
                for cidr in self.of_node(node) {
                    match self.get(cidr).await {
                        Ok(stored) if stored.block.affinity.as_deref() != Some(node) => {
                            self.remember(cidr, false);
                        }
                        Err(StoreError::NotFound) => self.remember(cidr, false),
                        read => take(read)?,
                    }
                }
            }
            Scope::All => {
                let mut page = ListParams::default().limit(PAGE);
                loop {
                    let answer = answered(self.inner.api.list(&page)).await?;
                    for item in answer.items {
                        take(read(item))?;
                    }
                    match answer.metadata.continue_.filter(|token| !token.is_empty()) {
                        Some(token) => page.continue_token = Some(token),
                        None => break,
                    }
                }
            }
        }
        Ok(out)
    }

    async fn get(&self, cidr: IpNet) -> Result<Stored, StoreError> {
        read(answered(self.inner.api.get(&name(&cidr))).await?)
    }

    async fn create(&self, block: &Block) -> Result<Stored, StoreError> {
        let object = self.object(block, None)?;
        let made =
            answered(self.inner.api.create(&params(), &object)).await.map_err(|error| match error {
                StoreError::NotFound => StoreError::Refused("the API server has no kind IPBlock".to_owned()),
                error => error,
            })?;
        self.remember(block.cidr, true);
        read(made)
    }

    async fn update(&self, block: &Block, version: &str) -> Result<Stored, StoreError> {
        let object = self.object(block, Some(version))?;
        let stored = read(answered(self.inner.api.replace(&block.name(), &params(), &object)).await?)?;
        self.remember(block.cidr, true);
        Ok(stored)
    }

    async fn delete(&self, cidr: IpNet, version: &str) -> Result<(), StoreError> {
        let resource_version = Some(version.to_owned());
        let params = DeleteParams::default().preconditions(Preconditions { resource_version, uid: None });
        answered(self.inner.api.delete(&name(&cidr), &params)).await?;
        self.remember(cidr, false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_says_that_nothing_was_done() {
        let of = |code: u16| {
            let status = kube::core::Status { code, message: "m".to_owned(), ..Default::default() };
            problem(&kube::Error::Api(Box::new(status)))
        };
        assert_eq!(of(404), StoreError::NotFound);
        assert_eq!(of(409), StoreError::Conflict);
        for code in [403, 422] {
            assert_eq!(of(code), StoreError::Refused("m".to_owned()));
        }
        for code in [401, 429, 500, 503] {
            assert_eq!(of(code), StoreError::Unavailable("m".to_owned()));
        }
    }
}
