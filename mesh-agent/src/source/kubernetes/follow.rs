//! One kind of object, listed page by page and then watched for ever: it resumes where it was after a disconnect, and
//! lists again when the API server has forgotten where that was (410).

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::{Client, Resource as _};
use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::item::{Item, Watched};
use crate::kubernetes::client::{ANSWERED, chain};
use crate::source::decode::{Decoded, Kind};

/// Objects a page: memory and the API server's time for one request stay small.
const PAGE: u32 = 500;
/// Seconds a watch lasts, at random between these, so that a thousand agents do not renew theirs at once.
const LASTS: std::ops::Range<u32> = 240..290;
/// After the first failure, and at most, the second doubling the first and so on.
const FIRST_WAIT: Duration = Duration::from_millis(400);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A watch that lived for so long makes a failure the first one again.
const HEALTHY: Duration = Duration::from_secs(30);

/// What a follower has to tell.
#[derive(Debug)]
pub(super) enum Heard {
    /// Everything there is.
    All(Vec<Decoded>),
    /// This is new, or has changed.
    Is(Box<Decoded>),
    /// This is gone.
    Gone(Box<Decoded>),
    /// Changes are heard from here on.
    Follows,
    /// Nothing is heard, and why: a word for programs and a sentence for people. What was heard before stays.
    Silent(&'static str, String),
}

/// Why a list or a watch ended.
enum Ended {
    /// The server closed it in time.
    Renew,
    /// Where we were is no more: list anew.
    Forgotten,
    /// Somebody asked for a new list.
    Asked,
    /// The API server has no such kind, and need not.
    Absent,
    Failed(&'static str, String),
    /// Nobody listens.
    Deaf,
}

/// Follows objects of kind `W`. `asked` grows when everything is to be listed anew.
pub(super) async fn follow<W: Watched>(
    client: Client,
    tell: mpsc::Sender<(Kind, Heard)>,
    asked: watch::Receiver<u64>,
) {
    let api = Api::all(client);
    Follower::<W> { api, tell, asked, at: None, served: false, failures: 0, in_a_row: 0 }.run().await;
}

struct Follower<W: Watched> {
    api: Api<Item<W>>,
    tell: mpsc::Sender<(Kind, Heard)>,
    asked: watch::Receiver<u64>,
    /// Resource version of the last that was heard.
    at: Option<String>,
    /// It was listed once: that it is not there any more would be an API server's passing trouble.
    served: bool,
    /// How many there were lately, for the wait until the next attempt.
    failures: u32,
    /// Since changes were last heard.
    in_a_row: u32,
}

impl<W: Watched> Follower<W> {
    async fn run(mut self) {
        loop {
            let started = Instant::now();
            let ended = match self.round().await {
                Ok(ended) | Err(ended) => ended,
            };
            if started.elapsed() >= HEALTHY {
                self.failures = 0;
            }
            match ended {
                Ended::Deaf => return,
                Ended::Renew => {}
                Ended::Asked => self.at = None,
                Ended::Absent => {
                    let again = sleep(Duration::from_secs(u64::from(rand::rng().random_range(LASTS))));
                    tokio::select! {
                        () = again => {}
                        Ok(()) = self.asked.changed() => {}
                    }
                }
                // A server that forgets all the time must not be listed all the time.
                Ended::Forgotten => {
                    self.at = None;
                    self.pause().await;
                }
                Ended::Failed(reason, message) => {
                    // The first failure is mostly a connection that was closed.
                    self.in_a_row = self.in_a_row.saturating_add(1);
                    if self.in_a_row > 1 && self.say(Heard::Silent(reason, message)).await.is_err() {
                        return;
                    }
                    self.pause().await;
                }
            }
        }
    }

    async fn round(&mut self) -> Result<Ended, Ended> {
        self.asked.mark_unchanged();
        let at = match self.at.clone() {
            Some(at) => at,
            None => self.list().await?,
        };
        self.watch(at).await
    }

    async fn list(&mut self) -> Result<String, Ended> {
        let mut all = Vec::new();
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let answer = timeout(ANSWERED, self.api.list(&page)).await;
            let answer = answer.map_err(|_| late("list"))?;
            if W::KIND.is_optional() && !self.served && is_not_served(&answer) {
                self.say(Heard::All(Vec::new())).await?;
                return Err(Ended::Absent);
            }
            let answer = answer.map_err(|error| failed(&error))?;
            all.extend(answer.items.into_iter().map(|item| item.decoded));
            match answer.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page.continue_token = Some(token),
                None => {
                    let at = answer.metadata.resource_version.unwrap_or_default();
                    self.say(Heard::All(all)).await?;
                    self.at = Some(at.clone());
                    self.served = true;
                    return Ok(at);
                }
            }
        }
    }

    async fn watch(&mut self, at: String) -> Result<Ended, Ended> {
        let lasts = rand::rng().random_range(LASTS);
        let params = WatchParams::default().timeout(lasts);
        let stream = timeout(ANSWERED, self.api.watch(&params, &at)).await;
        let stream = stream.map_err(|_| late("watch"))?.map_err(|error| failed(&error))?;
        let mut stream = stream.map_err(|error| failed(&error)).boxed();
        self.say(Heard::Follows).await?;
        self.in_a_row = 0;
        let limit = sleep(Duration::from_secs(u64::from(lasts)) + ANSWERED);
        tokio::pin!(limit);
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                _ = self.asked.changed() => return Ok(Ended::Asked),
                // The server should have ended it: the connection is dead.
                () = &mut limit => return Ok(Ended::Renew),
            };
            let heard = match event {
                None => return Ok(Ended::Renew),
                Some(event) => event?,
            };
            match heard {
                WatchEvent::Added(item) | WatchEvent::Modified(item) => {
                    self.at.clone_from(&item.meta().resource_version);
                    self.say(Heard::Is(Box::new(item.decoded))).await?;
                }
                WatchEvent::Deleted(item) => {
                    self.at.clone_from(&item.meta().resource_version);
                    self.say(Heard::Gone(Box::new(item.decoded))).await?;
                }
                WatchEvent::Bookmark(mark) => self.at = Some(mark.metadata.resource_version),
                WatchEvent::Error(status) if status.code == 410 => return Err(Ended::Forgotten),
                WatchEvent::Error(status) => return Err(Ended::Failed("WatchFailed", status.message)),
            }
        }
    }

    async fn say(&self, heard: Heard) -> Result<(), Ended> {
        self.tell.send((W::KIND, heard)).await.map_err(|_| Ended::Deaf)
    }

    /// Longer after each failure, and never the same for all agents.
    async fn pause(&mut self) {
        let longest = (FIRST_WAIT * 2u32.saturating_pow(self.failures.min(10))).min(LONGEST_WAIT);
        self.failures = self.failures.saturating_add(1);
        let wait = longest.mul_f64(rand::rng().random_range(0.5..1.0));
        tokio::select! {
            () = sleep(wait) => {}
            Ok(()) = self.asked.changed() => {}
        }
    }
}

fn is_not_served<T>(answer: &Result<T, kube::Error>) -> bool {
    matches!(answer, Err(kube::Error::Api(status)) if status.code == 404)
}

fn late(what: &str) -> Ended {
    Ended::Failed("Unreachable", format!("no answer to a {what} within {} s", ANSWERED.as_secs()))
}

fn failed(error: &kube::Error) -> Ended {
    let reason = match error {
        kube::Error::Api(status) => match status.code {
            410 => return Ended::Forgotten,
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "NotServed",
            _ => "RequestFailed",
        },
        kube::Error::Auth(_) => "Unauthorized",
        kube::Error::SerdeError(_) => "Unparsable",
        _ => "Unreachable",
    };
    Ended::Failed(reason, chain(error))
}

#[cfg(test)]
mod tests;
