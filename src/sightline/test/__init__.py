"""`sightline.test.test_utils`: where SGLang's pages look for it."""
