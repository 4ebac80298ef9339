//! What must hold for any bytes. The fuzz targets call these, and so does the test that replays the corpora.

use std::collections::BTreeMap;

use keyservice::admission::Incumbents;
use keyservice::announcement::ANNOTATIONS;
use keyservice::keyfile::{self, KeyFileProblem};
use keyservice::{Announcement, KeyError};

/// One annotation a line, in the order of `ANNOTATIONS`; a line of `-` leaves it out.
pub fn announcement(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let values = ANNOTATIONS.iter().zip(text.split('\n')).filter(|(_, value)| *value != "-");
    let annotations: BTreeMap<String, String> =
        values.map(|(key, value)| ((*key).to_owned(), value.to_owned())).collect();
    if let Ok(Some(read)) = Announcement::from_annotations("node", &annotations) {
        assert_eq!(read.validate(), Ok(()));
        let again = Announcement::from_annotations("node", &read.to_annotations());
        assert_eq!(again, Ok(Some(read)));
    }
}

/// A file of incumbents.
pub fn incumbents(data: &[u8]) {
    if let Ok(read) = Incumbents::parse(data) {
        let written = serde_json::json!({ "version": 1, "nodes": read }).to_string();
        assert_eq!(Incumbents::parse(written.as_bytes()).ok(), Some(read));
    }
}

/// A key file.
pub fn key_file(data: &[u8]) {
    match keyfile::parse(data) {
        Ok(key) => assert_eq!(key.public(), keyfile::parse(data).expect("the same bytes").public()),
        // Nothing that could quote the bytes, which may be a secret with one character wrong.
        Err(
            KeyFileProblem::Empty | KeyFileProblem::Key(KeyError::Encoding("base64") | KeyError::Length(_)),
        ) => {}
        Err(problem) => panic!("{problem}"),
    }
}
