//! A follower against an API server that says exactly what the test wants.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;

use super::super::item;
use super::*;

/// What the server says next, and to what it must be the answer.
struct Answer {
    to: &'static [&'static str],
    status: u16,
    body: String,
}

fn list(to: &'static [&'static str], names: &[&str], version: &str, more: Option<&str>) -> Answer {
    let items: Vec<Value> = names.iter().map(|name| node(name, version)).collect();
    let metadata = json!({"resourceVersion": version, "continue": more});
    let body = json!({"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items});
    Answer { to, status: 200, body: body.to_string() }
}

fn node(name: &str, version: &str) -> Value {
    json!({"metadata": {"name": name, "resourceVersion": version}})
}

fn watching(to: &'static [&'static str], events: &[(&str, Value)]) -> Answer {
    let lines =
        events.iter().map(|(kind, object)| json!({"type": kind, "object": object}).to_string() + "\n");
    Answer { to, status: 200, body: lines.collect() }
}

fn refused(to: &'static [&'static str], code: u16) -> Answer {
    Answer { to, status: code, body: gone(code).to_string() }
}

fn gone(code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "x", "code": code})
}

/// Checks what a follower of nodes tells while the server gives these answers, all of which it asks for.
async fn tells(answers: Vec<Answer>, expected: &[&str]) {
    tells_of::<item::Node>(answers, expected).await;
}

/// The same of another kind.
async fn tells_of<W: Watched>(answers: Vec<Answer>, expected: &[&str]) {
    let script = Arc::new(Mutex::new(VecDeque::from(answers)));
    let left = script.clone();
    let service = service_fn(move |request: Request<Body>| {
        let next = script.lock().unwrap().pop_front();
        async move {
            // The end of the script: silence.
            let Some(answer) = next else { return std::future::pending().await };
            let uri = request.uri().to_string();
            for part in answer.to {
                assert!(uri.contains(part), "{uri} has no {part}");
            }
            let body = Body::from(answer.body.into_bytes());
            Ok::<_, kube::Error>(Response::builder().status(answer.status).body(body).unwrap())
        }
    });
    let (tell, mut heard) = mpsc::channel(64);
    let (_ask, asked) = watch::channel(0);
    let follower = tokio::spawn(follow::<W>(Client::new(service, "default"), tell, asked));
    let mut lines: Vec<String> = Vec::new();
    while lines.len() < expected.len() || !left.lock().unwrap().is_empty() {
        let next = timeout(Duration::from_secs(30), heard.recv());
        lines.push(line(next.await.unwrap_or_else(|_| panic!("no more than {lines:?}")).unwrap().1));
    }
    follower.abort();
    assert_eq!(lines, expected);
}

fn line(heard: Heard) -> String {
    match heard {
        Heard::All(all) => {
            let names: Vec<&str> = all.iter().map(|decoded| decoded.key.name.as_str()).collect();
            format!("all {}", names.join(","))
        }
        Heard::Is(decoded) => format!("is {}", decoded.key.name),
        Heard::Gone(decoded) => format!("gone {}", decoded.key.name),
        Heard::Follows => "follows".to_owned(),
        Heard::Silent(reason, _) => reason.to_owned(),
    }
}

const LIST: &[&str] = &["/api/v1/nodes?", "limit=500"];

#[tokio::test]
async fn it_lists_in_pages_and_watches_from_there() {
    let answers = vec![
        list(LIST, &["a", "b"], "5", Some("more")),
        list(&["limit=500", "continue=more"], &["c"], "5", None),
        watching(
            &["watch=true", "resourceVersion=5"],
            &[("ADDED", node("d", "6")), ("DELETED", node("a", "7"))],
        ),
    ];
    tells(answers, &["all a,b,c", "follows", "is d", "gone a"]).await;
}

#[tokio::test]
async fn a_watch_that_ends_is_resumed_where_it_was_and_a_bookmark_moves_that() {
    let answers = vec![
        list(LIST, &["a"], "5", None),
        watching(&["resourceVersion=5"], &[("MODIFIED", node("a", "6"))]),
        watching(
            &["resourceVersion=6"],
            &[(
                "BOOKMARK",
                json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": "90"}}),
            )],
        ),
        watching(&["resourceVersion=90"], &[("ADDED", node("b", "91"))]),
    ];
    tells(answers, &["all a", "follows", "is a", "follows", "follows", "is b"]).await;
}

#[tokio::test]
async fn what_the_server_has_forgotten_is_listed_anew() {
    // In a watch, at its beginning, and between two pages.
    let answers = vec![
        list(LIST, &["a"], "5", None),
        watching(&["resourceVersion=5"], &[("ERROR", gone(410))]),
        list(LIST, &["b"], "20", None),
        refused(&["resourceVersion=20"], 410),
        list(LIST, &["b"], "30", Some("more")),
        refused(&["continue=more"], 410),
        list(LIST, &["c"], "40", None),
        watching(&["resourceVersion=40"], &[]),
    ];
    tells(answers, &["all a", "follows", "all b", "all c", "follows"]).await;
}

#[tokio::test]
async fn only_a_second_failure_in_a_row_is_told_and_the_first_answer_ends_it() {
    let answers = vec![
        list(LIST, &["a"], "5", None),
        refused(&["resourceVersion=5"], 500),
        watching(&["resourceVersion=5"], &[]),
        refused(&["resourceVersion=5"], 403),
        refused(&["resourceVersion=5"], 403),
        watching(&["resourceVersion=5"], &[("ADDED", node("b", "6"))]),
    ];
    tells(answers, &["all a", "follows", "Forbidden", "follows", "is b"]).await;
}

#[tokio::test]
async fn a_kind_that_need_not_be_there_has_no_objects_and_one_that_was_there_is_missed() {
    const POOLS: &[&str] = &["/apis/margay.io/v1alpha1/ippools?"];
    tells_of::<item::IpPool>(vec![refused(POOLS, 404)], &["all "]).await;
    let answers = vec![
        list(POOLS, &["a"], "5", None),
        refused(&["resourceVersion=5"], 410),
        refused(POOLS, 404),
        refused(POOLS, 404),
    ];
    tells_of::<item::IpPool>(answers, &["all a", "NotServed"]).await;
    tells(vec![refused(LIST, 404), refused(LIST, 404)], &["NotServed"]).await;
}

#[tokio::test]
async fn garbage_is_no_answer_and_costs_nothing_else() {
    let answers = vec![
        list(LIST, &["a"], "5", None),
        Answer {
            to: &["resourceVersion=5"],
            status: 200,
            body: "{\"type\":\"ADDED\",\"object\":7}\n{\n".to_owned(),
        },
        watching(&["resourceVersion=5"], &[("ADDED", node("b", "6"))]),
    ];
    tells(answers, &["all a", "follows", "follows", "is b"]).await;
}
