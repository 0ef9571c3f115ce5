"""What was kept, seen: a page on which methods and retentions stand side by side, and a picture."""





